package store

import (
	"context"
	"sync"
	"time"
)

// maxAttempts is how often a request is sent at most.
const maxAttempts = 3

// retryElsewhere calls f, and calls it again each time that there was no answer for a while: a request to a member of etcd that stands still hangs,
// and the next one goes to another. It returns the first answer without an error, else the last error. f may be called several times at
// once, and whatever it asks for must be harmless when it is asked for twice.
func retryElsewhere[T any](ctx context.Context, after time.Duration, f func(context.Context) (T, error)) (T, error) {
	type answer struct {
		value T
		err   error
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan answer, maxAttempts)
	ask := func() {
		wg.Go(func() {
			v, err := f(ctx)
			answers <- answer{v, err}
		})
	}
	ask()
	next := time.NewTicker(after)
	defer next.Stop()
	for asked, open := 1, 1; ; {
		select {
		case a := <-answers:
			if open--; a.err == nil || open == 0 {
				return a.value, a.err
			}
		case <-next.C:
			if asked < maxAttempts {
				asked, open = asked+1, open+1
				ask()
			}
		}
	}
}
