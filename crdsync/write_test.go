package crdsync

import (
	"fmt"
	"testing"

	"github.com/egret-project/egret/store"
)

func TestBatchesKeepUnitsWholeAndInOrder(t *testing.T) {
	op := func(n, bytes int) store.Op { return store.Op{Key: fmt.Sprint(n), Value: make([]byte, bytes)} }
	var units []unit
	n := 0
	for _, size := range []int{1, 119, 1, 60, 60, 2, 118} {
		var u unit
		for range size {
			u = append(u, op(n, 10))
			n++
		}
		units = append(units, u)
	}
	units = append(units, unit{op(n, maxBytes-100)}, unit{op(n+1, 200)})
	var got []int
	next := 0
	for _, b := range batches(units) {
		got = append(got, len(b))
		for _, o := range b {
			if o.Key != fmt.Sprint(next) {
				t.Fatalf("change %s where %d has to be", o.Key, next)
			}
			next++
		}
	}
	if want := "[120 61 62 118 1 1]"; fmt.Sprint(got) != want {
		t.Errorf("changes per transaction: got %v, want %s", got, want)
	}
}
