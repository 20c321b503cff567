package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

const (
	// readyTimeout is how long the target of a move that the owner asked for may take to get ready; milliseconds are
	// usual.
	readyTimeout = 5 * time.Second
	// avoidTime is for how long a node that did not get ready is asked for nothing.
	avoidTime = 30 * time.Second
)

// moves asks for planned moves of the node's egress IPs.
type moves struct {
	node  string
	store *store.Client
	log   *slog.Logger
	after time.Duration // for how long an IP belongs elsewhere before it is moved there; 0: it stays

	asked     map[netip.Addr]time.Time  // since when a planned move that this node asked for is seen
	avoid     map[string]time.Time      // until when a node is asked for nothing, since it did not get ready
	misplaced map[egress.Move]time.Time // since when an IP belongs to another node
}

func newMoves(cfg Config) moves {
	return moves{node: cfg.Node, store: cfg.Store, log: cfg.Log, after: cfg.Rebalance, asked: map[netip.Addr]time.Time{}, avoid: map[string]time.Time{}}
}

// request asks for planned moves of what this node shall not keep, one IP at a time: because it is cordoned, or because
// the IP belongs elsewhere. A request that did not come true is withdrawn, and another node asked. It returns when
// there is more to do by time alone.
func (m *moves) request(ctx context.Context, r round) (next time.Time, err error) {
	asked := map[netip.Addr]time.Time{}
	var errs []error
	for ip, move := range r.Moves {
		if move.Lease != r.lease.ID() {
			continue // the operator's, or another node's
		}
		if asked[ip] = m.asked[ip]; asked[ip].IsZero() {
			asked[ip] = r.now
		}
		able := slices.Contains(r.Candidates(r.PoolOf(ip)), move.To)
		if due := asked[ip].Add(readyTimeout); able && r.now.Before(due) {
			next = earlier(next, due)
			continue
		}
		ok, err := m.store.WithdrawMove(ctx, move)
		errs = append(errs, err)
		switch {
		case !ok: // it has come true, or will be tried again
		case able:
			m.avoid[move.To] = r.now.Add(avoidTime)
			m.log.Warn("planned move withdrawn: the target did not get ready", "egress_ip", ip, "node", move.To)
		default:
			m.log.Info("planned move withdrawn: the target may not take the IP any more, or restarts", "egress_ip", ip, "node", move.To)
		}
	}
	m.asked = asked
	for node, until := range m.avoid {
		if !r.now.Before(until) {
			delete(m.avoid, node)
		}
	}
	if r.Partial {
		return next, errors.Join(errs...) // it holds nothing
	}
	o, to := r.Leaving(r.facts)
	why, by := egress.ReasonDrain, r.Cordons[m.node].By
	if len(to) == 0 {
		var due time.Time
		o, to, due = m.dueToRebalance(r)
		next, why, by = earlier(next, due), egress.ReasonRebalance, ""
	}
	for _, node := range to {
		if until, avoided := m.avoid[node]; avoided {
			next = earlier(next, until)
		}
	}
	i := slices.IndexFunc(to, func(node string) bool { return m.avoid[node].IsZero() })
	if i < 0 || !r.owned(o) {
		return next, errors.Join(errs...)
	}
	ips := []netip.Addr{o.IP}
	if why == egress.ReasonRebalance { // a cordoned node gives away one at a time
		ips = r.Together(o.IP)
	}
	for _, ip := range ips {
		move := egress.Move{IP: ip, To: to[i], Since: r.now.UTC().Truncate(time.Millisecond), Why: why, By: by}
		if o := r.Owners[ip]; o.Node == m.node {
			ok, err := m.store.AskMove(ctx, r.lease, o, move)
			if errs = append(errs, err); ok {
				m.log.Info("planned move asked for", "egress_ip", ip, "node", move.To, "why", why)
			}
		}
	}
	return next, errors.Join(errs...)
}

// dueToRebalance returns the IP of this node that is the next to go where it belongs, once it has been misplaced for
// long enough, and else when that will be. Each node counts for itself: clocks differ, and a start begins anew.
func (m *moves) dueToRebalance(r round) (o egress.Owner, to []string, next time.Time) {
	if m.after == 0 {
		return o, nil, next
	}
	misplaced := r.Misplacements()
	since := map[egress.Move]time.Time{}
	for _, p := range misplaced {
		k := egress.Move{IP: p.Owner.IP, To: p.To}
		if since[k] = m.misplaced[k]; since[k].IsZero() {
			since[k] = r.now
		}
	}
	m.misplaced = since
	first, ok := r.Rebalance(misplaced)
	if !ok || first.Owner.Node != m.node {
		return o, nil, next
	}
	if due := since[egress.Move{IP: first.Owner.IP, To: first.To}].Add(m.after); r.now.Before(due) {
		return o, nil, due
	}
	return first.Owner, []string{first.To}, next
}
