package faults

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestScheduleIsTheSameForTheSameSeed(t *testing.T) {
	for round := range 20 {
		if diff := cmp.Diff(Schedule(7, round), Schedule(7, round)); diff != "" {
			t.Errorf("round %d (-once +again):\n%s", round, diff)
		}
	}
	if cmp.Equal(Schedule(7, 0), Schedule(8, 0)) || cmp.Equal(Schedule(7, 0), Schedule(7, 1)) {
		t.Error("another seed, or another round, has the same schedule")
	}
}

func TestScheduleMendsWhateverItBreaksAndDoesEverything(t *testing.T) {
	undo := map[string]string{}
	seen := map[string]bool{}
	for _, faults := range [][]fault{nodeFaults, processFaults, poolFaults} {
		for _, f := range faults {
			undo[f.verb] = f.undo
		}
	}
	for seed := range uint64(300) {
		open := map[Step]string{} // without its time -> what mends it
		down := map[string]bool{}
		for _, s := range Schedule(seed, 0) {
			seen[s.Verb] = true
			if s.Target == etcd || s.Target == apiServer {
				down[s.Target] = s.Verb == "stop"
			}
			if (s.Verb == "move" || s.Verb == "drain" || s.Verb == "uncordon") && down[etcd] {
				t.Errorf("seed %d: %s while etcd is stopped", seed, s)
			}
			mended := false
			for o, by := range open {
				if o.Target == s.Target && o.What == s.What && by == s.Verb {
					delete(open, o)
					mended = true
				}
			}
			if by, ok := undo[s.Verb]; ok && by != "" {
				s.At = 0
				if _, twice := open[s]; twice {
					t.Errorf("seed %d: %s twice", seed, s)
				}
				open[s] = by
			} else if !ok && !mended {
				t.Errorf("seed %d: %s mends nothing", seed, s)
			}
		}
		if len(open) > 0 {
			t.Errorf("seed %d: not mended: %v", seed, open)
		}
	}
	for verb, by := range undo {
		if !seen[verb] || by != "" && !seen[by] {
			t.Errorf("%s or %q is in no schedule of 300", verb, by)
		}
	}
}
