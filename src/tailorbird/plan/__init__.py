"""Budget, sensitivity, allocation: which choice for which place."""
