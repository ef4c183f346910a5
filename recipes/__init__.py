"""What a user writes: recipes, the structs that check them, the sizes that follow, and the checks before a launch."""

from asyncrl.recipes.load import RecipeError, dump_recipe, load_recipe, recipe_from
from asyncrl.recipes.recipe import Recipe

__all__ = ["Recipe", "RecipeError", "dump_recipe", "load_recipe", "recipe_from"]
