package crdsync

import (
	"maps"
	"math"
	"slices"

	"k8s.io/apimachinery/pkg/labels"
	operator "k8s.io/apimachinery/pkg/selection"
)

// index finds, of numbered label selectors, those that a set of labels may satisfy, without looking at all others.
type index struct {
	byLabel map[[2]string][]int // key and value -> the selectors that want this label
	rest    []int               // those that want no label in particular
}

// newIndex indexes each selector by the rarest of the labels that it cannot do without: a label that all have tells
// nothing.
func newIndex(selectors map[int]labels.Selector) index {
	wanted := map[int][][][2]string{} // selector -> its requirements -> the labels of which it wants one
	count := map[[2]string]int{}
	x := index{byLabel: map[[2]string][]int{}}
	for n, s := range selectors {
		requirements, selectable := s.Requirements()
		if !selectable {
			continue
		}
		wanted[n] = nil
		for _, r := range requirements {
			if op := r.Operator(); op != operator.In && op != operator.Equals && op != operator.DoubleEquals {
				continue
			}
			var alternatives [][2]string
			for _, v := range r.Values().UnsortedList() {
				alternatives = append(alternatives, [2]string{r.Key(), v})
				count[[2]string{r.Key(), v}]++
			}
			wanted[n] = append(wanted[n], alternatives)
		}
	}
	for _, n := range slices.Sorted(maps.Keys(wanted)) {
		var rarest [][2]string
		least := math.MaxInt
		for _, alternatives := range wanted[n] {
			sum := 0
			for _, label := range alternatives {
				sum += count[label]
			}
			if sum < least {
				rarest, least = alternatives, sum
			}
		}
		for _, label := range rarest {
			x.byLabel[label] = append(x.byLabel[label], n)
		}
		if rarest == nil {
			x.rest = append(x.rest, n)
		}
	}
	return x
}

// mayMatch returns the selectors that the labels may satisfy, in order. Each of them has to be asked.
func (x index) mayMatch(set map[string]string) []int {
	out := slices.Clone(x.rest)
	for k, v := range set {
		out = append(out, x.byLabel[[2]string{k, v}]...)
	}
	slices.Sort(out)
	return out
}
