package crdsync

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// TestTheIndexMissesNoSelector compares what the index finds with what asking every selector finds.
func TestTheIndexMissesNoSelector(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	key, value := func() string { return fmt.Sprint("k", r.IntN(4)) }, func() string { return fmt.Sprint("v", r.IntN(3)) }
	operators := []metav1.LabelSelectorOperator{
		metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist,
	}
	for range 200 {
		all := map[int]labels.Selector{0: labels.Nothing(), 1: labels.Everything()}
		for n := 2; n < 12; n++ {
			s := &metav1.LabelSelector{MatchLabels: map[string]string{}}
			for range r.IntN(3) {
				s.MatchLabels[key()] = value()
			}
			for range r.IntN(3) {
				m := metav1.LabelSelectorRequirement{Key: key(), Operator: operators[r.IntN(len(operators))]}
				if m.Operator == metav1.LabelSelectorOpIn || m.Operator == metav1.LabelSelectorOpNotIn {
					m.Values = []string{value(), value()} // now and then twice the same
				}
				s.MatchExpressions = append(s.MatchExpressions, m)
			}
			var err error
			if all[n], err = metav1.LabelSelectorAsSelector(s); err != nil {
				t.Fatal(err)
			}
		}
		x := newIndex(all)
		set := labels.Set{}
		for range r.IntN(4) {
			set[key()] = value()
		}
		found := x.mayMatch(set)
		if !slices.IsSorted(found) || len(slices.Compact(slices.Clone(found))) != len(found) {
			t.Fatalf("%v: found %v, want each once, in order", set, found)
		}
		for n, s := range all {
			if s.Matches(set) && !slices.Contains(found, n) {
				t.Fatalf("selector %q matches %q: not found among %v", s, set, found)
			}
		}
	}
}

func TestTheIndexLooksAtFew(t *testing.T) {
	all := map[int]labels.Selector{}
	for n := range 1000 {
		// the one that comes first by name tells nothing
		all[n] = labels.SelectorFromSet(labels.Set{"app": "web", "zone": fmt.Sprint(n)})
	}
	if got := newIndex(all).mayMatch(labels.Set{"app": "web", "zone": "7"}); !slices.Equal(got, []int{7}) {
		t.Errorf("found %v, want 7 alone", got)
	}
}
