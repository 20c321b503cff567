package crdsync

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// What etcd refuses for good is tried again all the same: an operator may change its limits and roles.
const (
	minRefused = time.Second
	maxRefused = 5 * time.Minute
)

// refusal is a change that etcd refused for good (store.ErrRefused).
type refusal struct {
	value []byte
	err   error
	wait  time.Duration
	due   time.Time
}

// refusals are those of one mirror.
type refusals struct {
	byKey map[string]refusal
	due   map[string]refusal // those that are tried again in this pass
}

// begin takes those that are due out, and adds them to the work.
func (r *refusals) begin(now time.Time, w *work) {
	r.due = map[string]refusal{}
	for key, f := range r.byKey {
		if now.Before(f.due) {
			continue
		}
		r.due[key] = f
		delete(r.byKey, key)
		if node, _, ok := strings.Cut(strings.TrimPrefix(key, store.MembersByNode), "/"); ok && strings.HasPrefix(key, store.MembersByNode) {
			w.addPods(node)
		} else if node, ok := strings.CutPrefix(key, store.PodPrefix); ok {
			w.addPods(node)
		} else if strings.HasPrefix(key, store.BlockPrefix) {
			w.objects = true // it is one of a node that has nothing else to be written, or has rested
		} else {
			w.records = true
		}
	}
}

// next returns when the next one is due; the zero Time: never.
func (r *refusals) next() (at time.Time) {
	for _, f := range r.byKey {
		if at.IsZero() || f.due.Before(at) {
			at = f.due
		}
	}
	return at
}

// waits reports whether one of the changes was refused as it is, and is not due.
func (r *refusals) waits(u unit) bool {
	return slices.ContainsFunc(u, func(op store.Op) bool {
		f, ok := r.byKey[op.Key]
		return ok && bytes.Equal(f.value, op.Value)
	})
}

// add notes that a unit was refused, and returns when it is tried again.
func (r *refusals) add(u unit, err error, now time.Time) time.Duration {
	op := u[0]
	f := refusal{value: op.Value, err: err, wait: minRefused}
	for _, before := range []map[string]refusal{r.due, r.byKey} {
		if old, ok := before[op.Key]; ok {
			f.wait = min(2*old.wait, maxRefused)
		}
	}
	f.due = now.Add(f.wait)
	if r.byKey == nil {
		r.byKey = map[string]refusal{}
	}
	r.byKey[op.Key] = f
	return f.wait
}

// remove drops the refusals of what was written.
func (r *refusals) remove(u unit) {
	for _, op := range u {
		delete(r.byKey, op.Key)
	}
}

// writer writes the units of one pass. It leaves out what is refused, and changes that have to come after that, so that
// no address is two egresses'. All others are written.
type writer struct {
	*mirror
	c       control
	have    records
	blocked map[string]bool // addresses and egresses of which a change was left out
}

// write writes the units, in order.
func (w *writer) write(ctx context.Context, units []unit) error {
	for len(units) > 0 {
		n := fits(units)
		if err := w.commit(ctx, units[:n]); err != nil {
			return err
		}
		units = units[n:]
	}
	return nil
}

// commit writes the units in one transaction, as long as etcd takes it.
func (w *writer) commit(ctx context.Context, units []unit) error {
	var free []unit
	for _, u := range units {
		if w.refused.waits(u) || w.waits(u) {
			w.block(u)
		} else {
			free = append(free, u)
		}
	}
	if len(free) == 0 {
		return nil
	}
	whole := w.blocks.guarded(slices.Concat(free...))
	switch revision, err := w.lead.CommitAt(ctx, whole...); {
	case err == nil:
		w.blocks.committed(whole, revision)
		w.refused.remove(whole)
		w.logChanges(whole, w.c, w.have)
		return nil
	case !errors.Is(err, store.ErrRefused), len(whole) == 1 && strings.HasPrefix(whole[0].Key, store.CounterPrefix): // nothing is given out that is not counted
		return err
	case len(free) == 1 && len(free[0].pairs()) == 1:
		wait := w.refused.add(free[0], err, time.Now())
		w.log.Warn("etcd refuses a change, all others go on; will retry", "err", fmt.Errorf("%s: %w", free[0][0].Key, err), "dur", wait)
		w.block(free[0])
		return nil
	case len(free) == 1:
		free = free[0].pairs()
	}
	half := len(free) / 2
	if err := w.commit(ctx, free[:half]); err != nil {
		return err
	}
	return w.commit(ctx, free[half:])
}

// pairs divides a unit of members into those of one egress each, with the blocks of ports that follow them. All others
// stay whole.
func (u unit) pairs() (out []unit) {
	last := ""
	for _, op := range u {
		name := ""
		if rest, ok := strings.CutPrefix(op.Key, store.MembersByNode); ok {
			_, name, _ = strings.Cut(rest, "/")
		} else if rest, ok := strings.CutPrefix(op.Key, store.MembersByEgress); ok {
			name, _, _ = strings.Cut(rest, "/")
		} else if out != nil && (strings.HasPrefix(op.Key, store.BlockPrefix) || strings.HasPrefix(op.Key, store.BlockHistoryPrefix)) {
			name = last
		} else {
			return []unit{u}
		}
		if name != last {
			out = append(out, nil)
		}
		last = name
		out[len(out)-1] = append(out[len(out)-1], op)
	}
	return out
}

// waits reports whether a unit is about an address or egress of one that was left out.
func (w *writer) waits(u unit) bool {
	return len(w.blocked) > 0 && slices.ContainsFunc(w.concerns(u), func(what string) bool { return w.blocked[what] })
}

func (w *writer) block(u unit) {
	for _, what := range w.concerns(u) {
		w.blocked[what] = true
	}
}

// concerns returns the addresses and egresses that a unit is about, where the order of changes matters: an address is
// taken before an egress has it, and free after no egress has it. Pods are listed before their egress, if need be:
// their traffic waits for it.
func (w *writer) concerns(u unit) (out []string) {
	addresses := func(p egress.Policy) {
		for _, a := range p.Addresses {
			out = append(out, a.IP.String())
		}
	}
	for _, op := range u {
		switch value := w.c.values[op.Key].(type) {
		case egress.Allocation:
			out = append(append(out, value.IP.String()), value.Egresses...)
		case egress.IDRecord:
			out = append(out, value.IP.String())
		case egress.Policy:
			addresses(value)
		}
		if name, ok := strings.CutPrefix(op.Key, store.EgressPrefix); ok {
			out = append(out, name)
			addresses(w.have.policies[name])
		} else if text, ok := strings.CutPrefix(op.Key, store.AllocationPrefix); ok {
			ip, err := netip.ParseAddr(text)
			if err == nil {
				out = append(append(out, text), w.have.allocations[ip].Egresses...)
			}
		} else if id, ok := strings.CutPrefix(op.Key, store.IDPrefix); ok {
			for i, ip := range w.have.ids {
				if i.String() == id {
					out = append(out, ip.String())
				}
			}
		}
	}
	return out
}

// addTo adds the refusals to c, for the status of their objects.
func (r *refusals) addTo(c control) {
	for _, key := range slices.Sorted(maps.Keys(r.byKey)) {
		err := fmt.Errorf("%s cannot be written: %w", key, r.byKey[key].err)
		if name, ok := strings.CutPrefix(key, store.PoolPrefix); ok {
			c.faults["pool "+name] = errors.Join(c.faults["pool "+name], err)
			continue
		}
		about := []string{strings.TrimPrefix(key, store.EgressPrefix)}
		if a, ok := c.values[key].(egress.Allocation); ok {
			about = a.Egresses
		}
		for _, name := range about {
			if v, ok := c.verdicts[name]; ok && (strings.HasPrefix(key, store.EgressPrefix) || strings.HasPrefix(key, store.AllocationPrefix)) {
				v.err = errors.Join(v.err, err)
				c.verdicts[name] = v
			}
		}
	}
}
