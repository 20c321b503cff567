package agent

import (
	"context"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

func TestAnAgentAtRestUsesOneProcessor(t *testing.T) {
	const most = 3
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(most))
	synctest.Test(t, func(t *testing.T) {
		is := func(what string, want int) {
			t.Helper()
			if synctest.Wait(); runtime.GOMAXPROCS(0) != want {
				t.Errorf("%s: %d processors, want %d", what, runtime.GOMAXPROCS(0), want)
			}
		}
		p := newProcessors()
		time.Sleep(restAfter - 1)
		is("at the beginning", most)
		time.Sleep(time.Nanosecond)
		is("at rest", 1)
		p.work()
		is("with work", most)
		time.Sleep(restAfter / 2)
		p.work()
		time.Sleep(restAfter - 1)
		is("with more work meanwhile", most)
		time.Sleep(time.Nanosecond)
		is("at rest again", 1)
		p.end()
		is("at its end", most)
		time.Sleep(2 * restAfter)
		is("after its end", most)
	})
}

func TestTheLoopRestsBetweenPasses(t *testing.T) {
	const most = 3
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(most))
	n := newNode(t)
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	seen := make(chan []int, 1)
	go func() {
		defer stop()
		var out []int
		for _, want := range []int{1, most} {
			for ctx.Err() == nil && runtime.GOMAXPROCS(0) != want {
				time.Sleep(time.Millisecond)
			}
			if ctx.Err() != nil {
				break // its end undoes what it did
			}
			if out = append(out, want); want == 1 {
				n.wake()
			}
		}
		seen <- out
	}()
	_ = n.loop(ctx) // it ends without error
	if got := <-seen; len(got) != 2 {
		t.Errorf("seen of 1 processor at rest and %d in a pass: %v", most, got)
	}
}
