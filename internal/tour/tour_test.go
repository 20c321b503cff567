package tour

import (
	"math/rand/v2"
	"testing"
)

func TestEachFollowsEachExactlyOnce(t *testing.T) {
	for n := range 20 {
		for seed := range uint64(20) {
			tour := New(rand.New(rand.NewPCG(seed, 0)), n)
			if n == 0 {
				if len(tour) != 0 {
					t.Fatalf("of no states: %v", tour)
				}
				continue
			}
			seen := map[[2]int]int{}
			for i := 1; i < len(tour); i++ {
				seen[[2]int{tour[i-1], tour[i]}]++
			}
			for from := range n {
				for to := range n {
					if got := seen[[2]int{from, to}]; got != 1 {
						t.Fatalf("n %d, seed %d: %d steps from %d to %d, want 1: %v", n, seed, got, from, to, tour)
					}
				}
			}
			if len(tour) != n*n+1 || tour[0] != tour[n*n] {
				t.Fatalf("n %d, seed %d: not a round of %d steps: %v", n, seed, n*n, tour)
			}
		}
	}
}

func TestSeedsGiveOtherOrders(t *testing.T) {
	a, b := New(rand.New(rand.NewPCG(1, 0)), 9), New(rand.New(rand.NewPCG(2, 0)), 9)
	for i := range a {
		if a[i] != b[i] {
			return
		}
	}
	t.Errorf("two seeds, one order: %v", a)
}
