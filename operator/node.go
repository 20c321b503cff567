package operator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// Cordon makes a node take no egress IPs, and give away those that it holds: its agent moves them, one at a time,
// without losing a packet. It returns before that has happened; see Drain.
func Cordon(ctx context.Context, c *store.Client, node string, w io.Writer) error {
	return cordon(ctx, c, node, "operator", w)
}

func cordon(ctx context.Context, c *store.Client, node, why string, w io.Writer) error {
	all, err := c.ReadAll(ctx)
	if err == nil {
		err = known(all, node)
	}
	if err == nil {
		err = c.Cordon(ctx, egress.Cordon{Node: node, Since: time.Now().UTC().Truncate(time.Second), Why: why})
	}
	if err != nil {
		return fmt.Errorf("cordoning %s: %w", node, err)
	}
	fmt.Fprintf(w, "%s: cordoned\n", node)
	return nil
}

// Leaving says what a cordon, or a drain, of a node does; "": it holds nothing that leaves.
func Leaving(ctx context.Context, c *store.Client, node string) (string, error) {
	all, err := c.ReadAll(ctx)
	if err == nil {
		err = known(all, node)
	}
	if err != nil {
		return "", fmt.Errorf("cordoning %s: %w", node, err)
	}
	egresses := byIP(&all.Snapshot)
	var leave, stay []string
	for _, ip := range slices.SortedFunc(maps.Keys(all.Owners), netip.Addr.Compare) {
		if all.Owners[ip].Node != node {
			continue
		}
		text := fmt.Sprintf("%s (%s)", ip, nobody(strings.Join(egresses[ip], ", ")))
		if isStatic(&all.Snapshot, ip) {
			stay = append(stay, text)
		} else {
			leave = append(leave, text)
		}
	}
	if len(leave) == 0 {
		return "", nil
	}
	text := fmt.Sprintf("%s takes no egress IPs from now on, and the %d that it holds move to other nodes, one at a time: %s.\nOpen connections go on, where pods' nodes have ports of their own.",
		node, len(leave), few(leave))
	if len(stay) > 0 {
		text += fmt.Sprintf("\nIt keeps the %d that are static: %s.", len(stay), few(stay))
	}
	return text, nil
}

// Uncordon ends a cordon. What left the node comes back only by a move, or by rebalancing.
func Uncordon(ctx context.Context, c *store.Client, node string, w io.Writer) error {
	all, err := c.ReadAll(ctx)
	if err != nil {
		return fmt.Errorf("uncordoning %s: %w", node, err)
	}
	ok, err := c.Uncordon(ctx, node)
	if err != nil {
		return fmt.Errorf("uncordoning %s: %w", node, err)
	}
	if all.Nodes[node].Cordoned {
		return stillCordoned(node, ok)
	}
	if ok {
		fmt.Fprintf(w, "%s: uncordoned\n", node)
		return nil
	}
	if err := known(all, node); err != nil {
		return fmt.Errorf("uncordoning %s: %w", node, err)
	}
	fmt.Fprintf(w, "%s is not cordoned\n", node)
	return nil
}

// stillCordoned is the error of an uncordon of a node that Kubernetes keeps cordoned. done: there was a cordon of
// Egret's, which is off.
func stillCordoned(node string, done bool) error {
	was := "there is no cordon of Egret's"
	if done {
		was = "Egret's own cordon is off"
	}
	return fmt.Errorf("uncordoning %s: %s, and it still takes no egress IPs: it is cordoned in Kubernetes (`kubectl uncordon %[1]s`), or shutting down, "+
		"or its annotation node.antrea.io/max-egress-ips is 0", node, was)
}

func known(all store.Everything, node string) error {
	if _, ok := all.Nodes[node]; !ok {
		return errors.New("there is no such node: `egret get nodes` lists them")
	}
	return nil
}

// Drain cordons a node and, unless patience is 0, waits until it holds no egress IP any more, reporting each that
// leaves to w: those that came meanwhile as well, and none comes after the cordon. An error names what is left, and
// why; the cordon stays. A static egress IP does not leave: it is where its address is.
func Drain(ctx context.Context, c *store.Client, node string, patience time.Duration, w io.Writer) error {
	if err := cordon(ctx, c, node, string(egress.ActDrain), w); err != nil {
		return err
	}
	all, err := c.ReadAll(ctx) // what was claimed before the cordon is there by now
	if err != nil {
		return fmt.Errorf("draining %s: %w", node, err)
	}
	mobile := map[netip.Addr]bool{}
	for ip, o := range all.Owners {
		if o.Node == node && !isStatic(&all.Snapshot, ip) {
			mobile[ip] = true
		}
	}
	fmt.Fprintf(w, "%s: %d egress IPs to give away\n", node, len(mobile))
	if patience == 0 {
		return nil
	}
	view := c.NewView(node)
	watch, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- view.Run(watch) }()
	defer func() { stop(); <-done }()
	left, err := waitEmpty(ctx, view, node, mobile, patience, w)
	if err == nil && len(left) == 0 {
		fmt.Fprintf(w, "%s: drained\n", node)
		return nil
	}
	reasons := []error{fmt.Errorf("draining %s: %d egress IPs left", node, len(left))}
	if err != nil {
		reasons[0] = fmt.Errorf("%w: %w", reasons[0], err)
	}
	if s := view.Snapshot(); s != nil {
		for _, ip := range left {
			reasons = append(reasons, fmt.Errorf("%s: %s", ip, stuck(s, node, ip)))
		}
	}
	return errors.Join(reasons...)
}

// waitEmpty returns when the node holds nothing that can leave, with what it still holds: known at the beginning, by
// the caller's look, which is older than the view. An error says why it waited for no more.
func waitEmpty(ctx context.Context, view *store.View, node string, known map[netip.Addr]bool, patience time.Duration, w io.Writer) (left []netip.Addr, err error) {
	patient, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	gone := 0
	for {
		s := view.Snapshot()
		if s != nil {
			held, mobile := map[netip.Addr]bool{}, false
			for ip, o := range s.Owners {
				if o.Node == node {
					held[ip] = true
					mobile = mobile || !isStatic(s, ip)
				}
			}
			for _, ip := range slices.SortedFunc(maps.Keys(known), netip.Addr.Compare) {
				if !held[ip] {
					gone++
					fmt.Fprintf(w, "%s: %s -> %s\n", ip, node, nobody(s.Owners[ip].Node))
				}
			}
			known, left = held, slices.SortedFunc(maps.Keys(held), netip.Addr.Compare)
			if !mobile {
				return left, nil
			}
			if !plan.Cordoned(s, node) {
				return left, errors.New("it was uncordoned meanwhile")
			}
		}
		select {
		case <-view.Changed():
		case <-patient.Done():
			if ctx.Err() != nil {
				return left, ctx.Err()
			}
			if s == nil || !view.Healthy() {
				return left, fmt.Errorf("etcd has not said within %v how things are", patience)
			}
			return left, fmt.Errorf("%d of %d have left within %v", gone, gone+len(left), patience)
		}
	}
}

// isStatic reports whether an egress IP is that of a link. One that no egress uses is not: its owner gives it back.
func isStatic(s *egress.Snapshot, ip netip.Addr) bool {
	for _, p := range s.Egresses {
		for _, a := range p.Addresses {
			if a.IP == ip {
				return a.Pool == ""
			}
		}
	}
	return false
}

// stuck says why an IP does not leave a cordoned node.
func stuck(s *egress.Snapshot, node string, ip netip.Addr) string {
	a, alive := s.Agents[node]
	switch {
	case isStatic(s, ip):
		return "it is static, and stays where its address is"
	case !alive:
		return "the node's agent is down"
	case a.Restarting:
		return "the node's agent restarts"
	}
	cluster := plan.New(s)
	_, to := cluster.Leaving(plan.Facts{Node: node})
	if len(to) > 0 || len(s.Moves) > 0 {
		return "it waits for its turn, or its target does not get ready: the logs of the agents say more"
	}
	pool := cluster.PoolOf(ip)
	candidates := cluster.Candidates(pool)
	if len(candidates) == 0 {
		return fmt.Sprintf("no other node that pool %s selects has a live agent and is not cordoned", pool)
	}
	return fmt.Sprintf("%s may hold no more egress IPs", strings.Join(candidates, ", "))
}
