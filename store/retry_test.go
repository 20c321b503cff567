package store

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestARequestThatHangsIsRetriedElsewhere(t *testing.T) {
	hangs := func(ctx context.Context) (string, error) { <-ctx.Done(); return "", ctx.Err() }
	says := func(what string, err error) func(context.Context) (string, error) {
		return func(context.Context) (string, error) { return what, err }
	}
	bad := errors.New("bad")
	for _, tt := range []struct {
		name  string
		calls []func(context.Context) (string, error)
		want  string
		err   error
		took  time.Duration
	}{
		{"an answer", []func(context.Context) (string, error){says("yes", nil)}, "yes", nil, 0},
		{"an error", []func(context.Context) (string, error){says("", bad)}, "", bad, 0},
		{"one hangs", []func(context.Context) (string, error){hangs, says("yes", nil)}, "yes", nil, time.Second},
		{"two hang", []func(context.Context) (string, error){hangs, hangs, says("yes", nil)}, "yes", nil, 2 * time.Second},
		{"one hangs, the other fails", []func(context.Context) (string, error){hangs, says("", bad), says("yes", nil)}, "yes", nil, 2 * time.Second},
		{"all hang", []func(context.Context) (string, error){hangs, hangs, hangs}, "", context.DeadlineExceeded, 10 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				began, calls := time.Now(), make(chan func(context.Context) (string, error), len(tt.calls))
				for _, c := range tt.calls {
					calls <- c
				}
				got, err := retryElsewhere(ctx, time.Second, func(ctx context.Context) (string, error) { return (<-calls)(ctx) })
				if got != tt.want || !errors.Is(err, tt.err) || time.Since(began) != tt.took {
					t.Errorf("%q, %v after %v; want %q, %v after %v", got, err, time.Since(began), tt.want, tt.err, tt.took)
				}
			})
		})
	}
}
