package crdsync

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

const (
	// maxOps is how many changes fit one transaction; see store.Op.
	maxOps = 120
	// maxBytes bounds the values of one transaction. etcd takes requests of 1.5 MiB.
	maxBytes = 1 << 20
)

// unit is changes that have to be in one transaction.
type unit []store.Op

// order is the order in which kinds of keys are written. An address is taken before the egress has it, and an egress is
// there before its pods are; what goes, goes the other way round.
var order = []string{store.CounterPrefix, store.IDPrefix, store.AllocationPrefix, store.PoolPrefix, store.NodePrefix, store.ServicePrefix, store.EgressPrefix}

// view is the cache, and its revision when a pass began to read it. What was decided by what the cache showed then must
// not be written over a record that came later.
type view struct {
	*store.Cache
	revision int64
}

// difference returns what makes the record of key that of value, nil: none. ok is false when there is nothing to do.
// Each change requires the revision of the record that the pass has seen: the error is store.ErrConflict when there is
// a later one already.
func difference(cache view, key string, value any) (op store.Op, ok bool, err error) {
	r, there := cache.Get(key)
	op = store.Op{Key: key, Absent: !there, Revision: r.Revision}
	ok = there
	if value != nil {
		if op.Value, err = store.Encode(value); err != nil {
			return op, false, err
		}
		ok = !there || !bytes.Equal(r.Value, op.Value)
	}
	if ok && r.Revision > cache.revision {
		return op, false, fmt.Errorf("comparing %s: %w", key, store.ErrConflict)
	}
	return op, ok, nil
}

// controlDifference returns what makes the records of etcd those of c: what is put, and what is deleted.
func controlDifference(cache view, c control) (puts, deletes []unit, err error) {
	for _, prefix := range order {
		keys := map[string]bool{}
		for key := range cache.List(prefix) {
			keys[key] = true
		}
		for key := range c.values {
			if strings.HasPrefix(key, prefix) {
				keys[key] = true
			}
		}
		for _, key := range slices.Sorted(maps.Keys(keys)) {
			if c.keep[key] || prefix == store.CounterPrefix && c.values[key] == nil {
				continue
			}
			op, ok, e := difference(cache, key, c.values[key])
			if err = errors.Join(err, e); !ok {
				continue
			}
			if op.Value != nil {
				puts = append(puts, c.withDependents(op))
			} else {
				deletes = append(deletes, c.withDependents(op))
			}
		}
	}
	slices.Reverse(deletes)
	return puts, deletes, err
}

// memberDifference returns what makes the members of a node those of groups. All pairs of records of the node are in
// one unit, as long as they fit one transaction: a pod that changes its egress leaves the one as it joins the other.
// blocks are the changes of blocks of ports that go with a pair, those of "" with none.
func memberDifference(cache view, node string, groups map[string]egress.Members, listed map[string]bool, blocks map[string]unit) ([]unit, error) {
	names := map[string]bool{}
	maps.Copy(names, listed)
	for name := range groups {
		names[name] = true
	}
	for name := range blocks {
		names[name] = true
	}
	var pairs []unit
	var errs error
	delete(names, "")
	for _, name := range slices.Sorted(maps.Keys(names)) {
		var value any
		if m, ok := groups[name]; ok {
			value = m
		}
		var pair unit
		for _, key := range memberKeys(node, name) {
			op, ok, err := difference(cache, key, value)
			if errs = errors.Join(errs, err); ok {
				pair = append(pair, op)
			}
		}
		pair = append(pair, blocks[name]...)
		if pair != nil {
			pairs = append(pairs, pair)
		}
	}
	if whole := slices.Concat(pairs...); len(whole) > 0 && len(whole) <= maxOps && size(whole) <= maxBytes {
		pairs = []unit{whole}
	}
	return append(pairs, blocks[""].byIP()...), errs // of these there may be more than fit one transaction
}

// byIP divides changes of blocks of ports into those of one IP each, the last of which is its guard.
func (u unit) byIP() (out []unit) {
	for len(u) > 0 {
		n := len(u)
		if i := slices.IndexFunc(u, func(op store.Op) bool { return op.Still != 0 }); i >= 0 {
			n = i + 1
		}
		out, u = append(out, u[:n:n]), u[n:]
	}
	return out
}

// memberKeys returns the keys of the members of an egress on a node. No gateway asks for the pods that no egress
// selects.
func memberKeys(node, name string) []string {
	keys := []string{store.MembersByNodeKey(node, name)}
	if name != egress.Unselected {
		keys = append(keys, store.MembersByEgressKey(name, node))
	}
	return keys
}

// listedMembers returns the names of the egresses of which etcd lists members, by node, under either key.
func listedMembers(cache *store.Cache) map[string]map[string]bool {
	out := map[string]map[string]bool{}
	add := func(node, name string) {
		if out[node] == nil {
			out[node] = map[string]bool{}
		}
		out[node][name] = true
	}
	for key := range cache.List(store.MembersByNode) {
		if node, name, ok := strings.Cut(strings.TrimPrefix(key, store.MembersByNode), "/"); ok {
			add(node, name)
		}
	}
	for key := range cache.List(store.MembersByEgress) {
		if name, node, ok := strings.Cut(strings.TrimPrefix(key, store.MembersByEgress), "/"); ok {
			add(node, name)
		}
	}
	return out
}

// fits returns how many of the first units fit one transaction; one does always.
func fits(units []unit) (n int) {
	for ops, bytes := 0, 0; n < len(units); n++ {
		ops, bytes = ops+len(units[n]), bytes+size(units[n])
		if n > 0 && (ops > maxOps || bytes > maxBytes) {
			break
		}
	}
	return n
}

func size(u unit) (n int) {
	for _, op := range u {
		n += len(op.Key) + len(op.Value)
	}
	return n
}
