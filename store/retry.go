package store

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

const (
	// insistTime is for how long Insist waits for the first answer: a request that a member forwards to a leader which
	// hands over gets none. For each further one it waits twice as long, since an etcd may be as slow.
	insistTime = 400 * time.Millisecond
	// insistGap is how long it waits after an error.
	insistGap = 20 * time.Millisecond
)

// Insist calls f until it succeeds, or returns an error that the next call would return as well, or ctx ends. For what is
// to be done while a member of etcd stops: its errors have many forms. What f asks for may be done all the same, also
// while it is called again.
func Insist(ctx context.Context, f func(context.Context) error) error {
	for wait := insistTime; ; wait *= 2 {
		try, cancel := context.WithTimeout(ctx, wait)
		err := f(try)
		cancel()
		if err == nil || lasting(err) || !sleep(ctx, insistGap) {
			return err
		}
	}
}

// lasting reports whether the same request would get the error again.
func lasting(err error) bool {
	err = refusal(err)
	return slices.ContainsFunc([]error{ErrChanged, ErrLeaseLost, ErrRefused, rpctypes.ErrLeaseNotFound, rpctypes.ErrNoSpace},
		func(target error) bool { return errors.Is(err, target) })
}

// maxAttempts is how often retryElsewhere sends a request at most.
const maxAttempts = 3

// elsewhere returns after how long another member of etcd is asked: never, where there is only one.
func (c *Client) elsewhere(after time.Duration) time.Duration {
	if len(c.etcd.Endpoints()) < 2 {
		return time.Hour // no request takes as long
	}
	return after
}

// retryElsewhere calls f, and again whenever there was no answer for the time after: a request to a member of etcd that
// stands still hangs, and the next one goes to another member. It returns the first answer without an error, else the
// last error. Calls of f may run at the same time, and its request must be harmless when it is sent twice.
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
