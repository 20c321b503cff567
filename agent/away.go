package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

const (
	// patience is how long the target of a move that the owner asked for may take to get ready; milliseconds are usual.
	patience = 5 * time.Second
	// avoidance is for how long a node that did not get ready is asked for nothing.
	avoidance = 30 * time.Second
)

// giveAway asks for planned moves of what this node shall not keep, one IP at a time: because it is cordoned, or because the IP belongs
// elsewhere. A request that did not come true is withdrawn, and another node asked. It returns when there is more to do by time alone.
func (a *agent) giveAway(ctx context.Context, t turn) (next time.Time, err error) {
	asked := map[netip.Addr]time.Time{}
	var errs []error
	for ip, m := range t.Moves {
		if m.Lease != t.lease.ID() {
			continue // the operator's, or another node's
		}
		if asked[ip] = a.asked[ip]; asked[ip].IsZero() {
			asked[ip] = t.now
		}
		able := slices.Contains(t.Candidates(t.PoolOf(ip)), m.To)
		if due := asked[ip].Add(patience); able && t.now.Before(due) {
			next = earlier(next, due)
			continue
		}
		ok, err := a.Store.WithdrawMove(ctx, m)
		errs = append(errs, err)
		switch {
		case !ok: // it has come true, or will be tried again
		case able:
			a.avoid[m.To] = t.now.Add(avoidance)
			a.Log.Warn("planned move withdrawn: the target did not get ready", "egress_ip", ip, "node", m.To)
		default:
			a.Log.Info("planned move withdrawn: the target may not take the IP any more, or restarts", "egress_ip", ip, "node", m.To)
		}
	}
	a.asked = asked
	for node, until := range a.avoid {
		if !t.now.Before(until) {
			delete(a.avoid, node)
		}
	}
	o, to := t.Leaving(t.facts)
	why := egress.ReasonDrain
	if len(to) == 0 {
		var due time.Time
		o, to, due = a.belongs(t)
		next, why = earlier(next, due), egress.ReasonRebalance
	}
	for _, node := range to {
		if until, avoided := a.avoid[node]; avoided {
			next = earlier(next, until)
		}
	}
	i := slices.IndexFunc(to, func(node string) bool { return a.avoid[node].IsZero() })
	if i < 0 || !t.holds(o) {
		return next, errors.Join(errs...)
	}
	ips := []netip.Addr{o.IP}
	if why == egress.ReasonRebalance { // a cordoned node gives away one at a time
		ips = t.Together(o.IP)
	}
	for _, ip := range ips {
		m := egress.Move{IP: ip, To: to[i], Since: t.now.UTC().Truncate(time.Millisecond), Why: why}
		if o := t.Owners[ip]; o.Node == a.Node {
			ok, err := a.Store.AskMove(ctx, t.lease, o, m)
			if errs = append(errs, err); ok {
				a.Log.Info("planned move asked for", "egress_ip", ip, "node", m.To, "why", why)
			}
		}
	}
	return next, errors.Join(errs...)
}

// belongs returns the IP of this node that is the next to go where it belongs, once it has been misplaced for long enough, and else when
// that will be. Each node counts for itself: clocks differ, and a start begins anew.
func (a *agent) belongs(t turn) (o egress.Owner, to []string, next time.Time) {
	if a.Rebalance == 0 {
		return o, nil, next
	}
	misplaced := t.Misplacements()
	since := map[egress.Move]time.Time{}
	for _, m := range misplaced {
		k := egress.Move{IP: m.Owner.IP, To: m.To}
		if since[k] = a.misplaced[k]; since[k].IsZero() {
			since[k] = t.now
		}
	}
	a.misplaced = since
	m, ok := t.Rebalance(misplaced)
	if !ok || m.Owner.Node != a.Node {
		return o, nil, next
	}
	if due := since[egress.Move{IP: m.Owner.IP, To: m.To}].Add(a.Rebalance); t.now.Before(due) {
		return o, nil, due
	}
	return m.Owner, []string{m.To}, next
}

// history keeps the histories of egress IPs short, beside the loop: nothing waits for it.
type history struct {
	wake chan struct{} // capacity 1

	mu  sync.Mutex // guards ips
	ips map[netip.Addr]bool
}

func newHistory() *history {
	return &history{wake: make(chan struct{}, 1), ips: map[netip.Addr]bool{}}
}

// trim notes that the history of ip has grown.
func (h *history) trim(ip netip.Addr) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ips[ip] = true
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

func (h *history) run(ctx context.Context, c *store.Client, log *slog.Logger) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.wake:
		}
		h.mu.Lock()
		var ips []netip.Addr
		for ip := range h.ips {
			ips = append(ips, ip)
		}
		clear(h.ips)
		h.mu.Unlock()
		for _, ip := range ips {
			// What stays too long goes with the IP's next change of owner.
			if err := c.TrimHistory(ctx, ip); err != nil && ctx.Err() == nil {
				log.Warn("history not trimmed", "egress_ip", ip, "err", err)
			}
		}
	}
}
