package agent

import (
	"context"
	"net/netip"
	"time"

	"github.com/egret-project/egret/store"
)

const (
	// lateTime is for how long after it was sent a request may still reach etcd, and what it did the view. The agent
	// gives up after a second, its connections end 13 s after etcd was last heard, etcd has 7 s to agree on what it was
	// asked for, and a list that the view waits for takes 30 s at most.
	lateTime = 2 * time.Minute
	// ownedInterval is how often an agent that sees a part of the owners asks etcd whether it holds something all the
	// same: one whose member stood still for longer than lateTime may have been given what the agent once claimed.
	ownedInterval = 5 * time.Minute
	// maxOwners is the most owners that are watched one by one: each watch costs etcd memory, and a node whose pods use
	// as many egress IPs sees most changes in any case.
	maxOwners = 64
)

// scope is which owners the agent sees.
type scope struct {
	asked time.Time // when etcd was asked last what the lease holds
	owned bool      // it holds something, or that is not known
}

// scopeOf returns what the view has to show: the owners of all egress IPs, or where the machine does with fewer, and
// etcd says that the node holds none, those that its pods use. next is when etcd is to be asked again.
func (a *agent) scopeOf(ctx context.Context, r round, follow []string, owners []netip.Addr) (s store.Scope, next time.Time) {
	s = store.Scope{Egresses: follow}
	if r.all || len(owners) > maxOwners {
		a.scope = scope{}
		return s, time.Time{}
	}
	if r.now.Sub(a.scope.asked) >= ownedInterval {
		try, cancel := context.WithTimeout(ctx, time.Second)
		held, err := r.lease.Owned(try)
		cancel()
		a.scope = scope{asked: r.now, owned: err != nil || len(held) > 0}
	}
	if !a.scope.owned {
		s.Narrow, s.Owners = true, owners
	}
	return s, a.scope.asked.Add(ownedInterval)
}
