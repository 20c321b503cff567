// Package tour orders the steps of a test that reaches every state from every other one. Nothing of it reaches a
// binary.
package tour

import (
	"math/rand/v2"
	"slices"
)

// New returns the numbers of n states in an order in which each follows each, itself too, exactly once: n*n+1 of them,
// the last being the first again. Pairs one by one would take twice as many steps, of which every other one is no pair
// that is wanted.
//
// The states and the steps between them are a complete directed graph: as many steps end in a state as begin there, so
// there is a way along all of them that ends where it begins. Hierholzer's algorithm finds one, here among steps in
// random order.
func New(random *rand.Rand, n int) []int {
	if n == 0 {
		return nil
	}
	steps := make([][]int, n) // from each state, those not yet taken
	for i := range steps {
		steps[i] = random.Perm(n)
	}
	var tour []int
	for way := []int{random.IntN(n)}; len(way) > 0; {
		at := way[len(way)-1]
		if left := steps[at]; len(left) > 0 {
			steps[at] = left[1:]
			way = append(way, left[0])
			continue
		}
		tour, way = append(tour, at), way[:len(way)-1]
	}
	slices.Reverse(tour) // it was found from its end
	return tour
}
