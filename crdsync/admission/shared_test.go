package admission

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestThoseWhoAskWhileSomethingIsReadShareTheNextReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared[int]
		readings := 0
		read := func(context.Context) (int, error) {
			readings++
			n := readings
			time.Sleep(time.Second)
			return n, nil
		}
		var asking sync.WaitGroup
		ask := func(want int) {
			asking.Go(func() {
				if got, err := s.read(t.Context(), read); err != nil || got != want {
					t.Errorf("got reading %d, %v, want %d: one that began after the question", got, err, want)
				}
			})
		}
		ask(1)
		synctest.Wait()
		time.Sleep(time.Millisecond)
		for range 50 {
			ask(2) // the first one is too old for them
		}
		time.Sleep(time.Second)
		synctest.Wait()
		ask(3)
		asking.Wait()
		if readings != 3 {
			t.Errorf("read %d times, want 3", readings)
		}
		time.Sleep(time.Minute)
		ask(4)
		asking.Wait()
	})
}

func TestWhoHangsUpTakesNoReadingFromOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared[int]
		bad := errors.New("bad")
		read := func(ctx context.Context) (int, error) {
			select {
			case <-time.After(time.Second):
				return 0, bad
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
		first, hangUp := context.WithCancel(t.Context())
		var asking sync.WaitGroup
		asking.Go(func() {
			if _, err := s.read(first, read); !errors.Is(err, context.Canceled) {
				t.Errorf("who hung up got %v", err)
			}
		})
		second := func() {
			asking.Go(func() {
				if _, err := s.read(t.Context(), read); !errors.Is(err, bad) {
					t.Errorf("the other one got %v, want the reading's own error", err)
				}
			})
		}
		synctest.Wait()
		second()
		synctest.Wait()
		hangUp()
		asking.Wait()
		// One whose reading never ends is given up, and the next one is not.
		asking.Go(func() {
			if _, err := s.read(t.Context(), func(ctx context.Context) (int, error) { <-ctx.Done(); return 0, ctx.Err() }); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a reading without an end: %v", err)
			}
		})
		synctest.Wait()
		second()
		asking.Wait()
	})
}
