package crdsync

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/store"
)

// Who stands for election can read the Kubernetes API: one that cannot does not stand, or withdraws after half of
// readPatience. So a leader that has not read it for readPatience, and finds others standing, is the one that is cut
// off, and resigns. Where all are, it finds nobody.
const (
	readPatience = 10 * time.Second
	// reachTimeout and reachInterval are those of the question whether it can be read.
	reachTimeout, reachInterval = 5 * time.Second, time.Second
)

var errUnread = errors.New("the Kubernetes API cannot be read")

// reach waits until the Kubernetes API answers: who cannot read it is of no use as a leader.
func (r *replica) reach(ctx context.Context) error {
	for said := false; ; said = true {
		err := r.ask(ctx)
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		if !said {
			r.Log.Warn("the Kubernetes API cannot be read, not standing for election", "err", err)
		}
		select {
		case <-time.After(reachInterval):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ask reads something of the Kubernetes API.
func (r *replica) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	_, err := r.dynamic.Resource(v1beta1.EgressResource).List(ctx, metav1.ListOptions{Limit: 1})
	return err
}

// unread returns when the Kubernetes API has not been read for that long, and enough agrees, with errUnread; or with
// the error of ctx.
func (r *replica) unread(ctx context.Context, limit time.Duration, enough func() bool) error {
	for last := time.Now(); ; {
		err := r.ask(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil:
			last = time.Now()
		case time.Since(last) >= limit && enough():
			return fmt.Errorf("%w for %v: %w", errUnread, time.Since(last).Round(time.Second), err)
		}
		select {
		case <-time.After(reachInterval):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// campaign stands for election, as long as the Kubernetes API can be read: errUnread. end is for after the leadership.
func (r *replica) campaign(ctx context.Context) (lead *store.Leadership, end func(), err error) {
	whole, cancel := context.WithCancel(ctx)
	standing, elected := context.WithCancel(ctx)
	unread := make(chan error, 1)
	go func() {
		err := r.unread(standing, cmp.Or(r.readPatience, readPatience)/2, func() bool { return true })
		if standing.Err() == nil {
			cancel()
		}
		unread <- err
	}()
	lead, err = r.Store.Campaign(whole, store.CrdsyncElection, r.ID, r.ElectionTTL)
	elected()
	if why := <-unread; errors.Is(why, errUnread) {
		err = why
	}
	if err != nil && lead != nil {
		r.resign(ctx, lead)
	}
	if err != nil {
		cancel()
	}
	return lead, cancel, err
}

// partitioned returns when this leader has not read the Kubernetes API for readPatience, and others can.
func (r *replica) partitioned(ctx context.Context, lead *store.Leadership) error {
	return r.unread(ctx, cmp.Or(r.readPatience, readPatience), func() bool {
		ctx, cancel := context.WithTimeout(ctx, reachTimeout)
		defer cancel()
		others, err := lead.Others(ctx)
		return err == nil && others > 0
	})
}
