package crdsync

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

const (
	// maxTenures bounds the records of blocks-history/. A record takes some 0.4 KB of etcd's database with a node's
	// name of a cloud, so these are 80 MB of etcd's 2 GB, beside the 250,000 blocks in use that 5,000 egress IPs with
	// pods on 50 nodes each have. A node of those that is drained writes 5,000 at once.
	maxTenures = 200_000
	// maxTenuresOfIP bounds those of one IP, so that one whose pods come and go all the time does not drive out all
	// others.
	maxTenuresOfIP = 2_000
	// trimEvery is how often it is looked whether there are too many or too old ones: a listing of their keys, some 15
	// MB of as many as there may be.
	trimEvery = time.Hour
	// trimAtOnce is how many are deleted until others have had their turn at etcd, and trimPause how long that is.
	trimAtOnce, trimPause = 10 * maxOps, time.Second
)

// blockHistory remembers in etcd who had which ports, and forgets what is too old and too much. A nil *blockHistory
// remembers nothing.
type blockHistory struct {
	store *store.Client
	lead  *store.Leadership
	keep  time.Duration
	most  int // in all; 0: maxTenures
	ofIP  int // of one IP; 0: maxTenuresOfIP
	log   *slog.Logger

	known atomic.Int64 // how many there are at least
	full  atomic.Bool  // it was said that there are too many
}

// newBlockHistory returns the history of blocks that a leadership keeps; nil: none. An etcd whose roles are of an older
// version takes no such records, and with them not the changes of blocks that they belong to: then nothing is
// remembered.
func (r *replica) newBlockHistory(ctx context.Context, lead *store.Leadership) (*blockHistory, error) {
	if r.BlockHistory == 0 {
		return nil, nil
	}
	lacks, err := r.Store.Lacks(ctx, []store.Grant{{Key: store.BlockHistoryPrefix, Write: true}})
	if err != nil {
		return nil, err
	}
	if len(lacks) > 0 {
		r.Log.Warn("no history of blocks of ports is kept: etcd's role of crdsync is of an older version; run egret etcd-rbac", "lacks", lacks)
		return nil, nil
	}
	return &blockHistory{store: r.Store, lead: lead, keep: r.BlockHistory, log: r.Log}, nil
}

// record returns the change that adds a block to the history; none where that is full.
func (h *blockHistory) record(b egress.Block) unit {
	if h == nil || b.Node == "" || b.Freed.IsZero() {
		return nil
	}
	if h.known.Load() >= int64(cmp.Or(h.most, maxTenures)) {
		if !h.full.Swap(true) {
			h.log.Error("the history of blocks of ports is full, and gets no more until older records are deleted; this log has it", "records", h.known.Load())
		}
		return nil
	}
	t := b.Tenure()
	value, err := store.Encode(t)
	if err != nil {
		return nil // strings, numbers and times of a record that was read
	}
	return unit{{Key: store.BlockHistoryKey(t), Value: value}}
}

// written notes that one more is in etcd.
func (h *blockHistory) written() { h.known.Add(1) }

// former returns the change by which it is known later that a node had the block before: it rests, and is to be the
// node's again.
func (b *blocks) former(id blockID, is egress.Block) unit {
	if was := b.byIP[id.ip][id.first]; was != nil && is.Freed.IsZero() {
		return b.history.record(was.Block)
	}
	return nil
}

// run trims until ctx ends.
func (h *blockHistory) run(ctx context.Context) error {
	if h == nil {
		return nil
	}
	for wait := time.Duration(0); ; {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
		more, err := h.trim(ctx, time.Now())
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, store.ErrNotLeader):
			return err
		case err != nil:
			h.log.Warn("records of which node had which ports not trimmed, will retry", "err", err)
			wait = maxBackoff
		case more:
			wait = trimPause
		default:
			wait = trimEvery
			if h.full.Load() {
				wait = time.Minute
			}
		}
	}
}

// trim deletes what is too old, and then the oldest of what is too much, but not more than trimAtOnce; more: there is
// more to be deleted.
func (h *blockHistory) trim(ctx context.Context, now time.Time) (more bool, err error) {
	type record struct {
		key   string
		ip    netip.Addr
		until time.Time
	}
	var all []record
	var drop []string
	before := h.known.Load()
	ofIP := map[netip.Addr]int{}
	err = h.store.EachKey(ctx, store.BlockHistoryPrefix, garbagePage, func(key string) error {
		ip, until, err := store.BlockHistoryEnd(key)
		if err != nil {
			drop = append(drop, key) // nobody else writes here, and nobody can read it
			return nil
		}
		all = append(all, record{key, ip, until})
		ofIP[ip]++
		return nil
	})
	if err != nil {
		return false, err
	}
	there := len(all) + len(drop)
	slices.SortFunc(all, func(a, b record) int { return cmp.Or(a.until.Compare(b.until), cmp.Compare(a.key, b.key)) })
	// A tenth below the bound: so it is not at it again with the next record.
	tooMany := 0
	if most := cmp.Or(h.most, maxTenures); len(all) > most*9/10 {
		tooMany = len(all) - most*9/10
	}
	for i, r := range all {
		if i < tooMany || now.Sub(r.until) > h.keep || ofIP[r.ip] > cmp.Or(h.ofIP, maxTenuresOfIP) {
			drop = append(drop, r.key)
			ofIP[r.ip]--
		}
	}
	more = len(drop) > trimAtOnce
	drop = drop[:min(len(drop), trimAtOnce)]
	for keys := range slices.Chunk(drop, maxOps) {
		var ops []store.Op
		for _, key := range keys {
			ops = append(ops, store.Op{Key: key})
		}
		if err := h.lead.Commit(ctx, ops...); err != nil {
			return false, fmt.Errorf("deleting the oldest: %w", err)
		}
	}
	// What was written meanwhile may have been listed, and counts twice then: that is on the safe side, until the next
	// time.
	h.known.Add(int64(there-len(drop)) - before)
	if !more && h.full.Swap(false) {
		h.log.Info("the history of blocks of ports gets more again", "records", h.known.Load())
	}
	return more, nil
}
