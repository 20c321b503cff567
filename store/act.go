package store

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
)

// actsFor is for how long the record of an act is kept: it is under a lease of its own, so that no number of them fills
// etcd.
const actsFor = 90 * 24 * time.Hour

// act returns the write that records an act of the Client's user, for the transaction that does the act, and undone, to
// be called when the transaction was not done. Without Config.By there is no write.
func (c *Client) act(ctx context.Context, a egress.Act) (write []clientv3.Op, undone func(), err error) {
	if c.by == "" {
		return nil, func() {}, nil
	}
	l, err := c.Grant(ctx, actsFor)
	if err != nil {
		return nil, nil, fmt.Errorf("noting who does it: %w", err)
	}
	undone = func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
		defer cancel()
		_ = l.Revoke(end) // there is nothing under it, and it ends by itself
	}
	a.By, a.Since = c.by, time.Now().UTC()
	key := c.key(ActKey(a))
	a.Since = a.Since.Truncate(time.Millisecond)
	v, err := Encode(a)
	return []clientv3.Op{clientv3.OpPut(key, string(v), clientv3.WithLease(l.id))}, undone, err
}

// Acts returns what people did, the oldest first, and the records that cannot be read.
func (c *Client) Acts(ctx context.Context) (acts []egress.Act, faults []egress.Fault, err error) {
	records, err := c.List(ctx, ActPrefix)
	if err != nil {
		return nil, nil, fmt.Errorf("reading etcd: %w", err)
	}
	for _, key := range slices.Sorted(maps.Keys(records)) {
		a, err := Decode[egress.Act](records[key])
		if err != nil {
			faults = append(faults, egress.Fault{Key: key, Err: err})
			continue
		}
		acts = append(acts, a)
	}
	slices.SortStableFunc(acts, func(a, b egress.Act) int { return a.Since.Compare(b.Since) })
	return acts, faults, nil
}

// ActKey is the key of an egress.Act. Time, user and what it is about make it unique.
func ActKey(a egress.Act) string {
	about := a.Node
	if a.IP.IsValid() {
		about = a.IP.String()
	}
	return ActPrefix + a.Since.UTC().Format("20060102T150405.000000000") + "-" + string(a.What) + "-" + cmp.Or(about, "-")
}
