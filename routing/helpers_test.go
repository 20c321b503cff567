package routing

import (
	"slices"
	"strings"
)

// unordered returns the lines sorted: rules of one priority, neighbours and the like come in the order in which they were made.
func unordered(text string) []string {
	return slices.Sorted(strings.Lines(text))
}
