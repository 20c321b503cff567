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

// Cordon makes a node take no egress IPs, and give away those that it holds: its agent moves them, one at a time, without losing a packet.
// It returns before that has happened; see Drain.
func Cordon(ctx context.Context, c *store.Client, node string, w io.Writer) error {
	_, err := cordon(ctx, c, node, w)
	return err
}

func cordon(ctx context.Context, c *store.Client, node string, w io.Writer) (store.Everything, error) {
	all, err := c.ReadAll(ctx)
	if err == nil {
		err = known(all, node)
	}
	if err == nil {
		err = c.Cordon(ctx, egress.Cordon{Node: node, Since: time.Now().UTC().Truncate(time.Second), Why: "operator"})
	}
	if err != nil {
		return all, fmt.Errorf("cordoning %s: %w", node, err)
	}
	fmt.Fprintf(w, "%s: cordoned\n", node)
	return all, nil
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
		return fmt.Errorf("uncordoning %s: it is cordoned in Kubernetes too (`kubectl uncordon %s`), or shutting down, or its annotation "+
			"node.antrea.io/max-egress-ips is 0", node, node)
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

func known(all store.Everything, node string) error {
	if _, ok := all.Nodes[node]; !ok {
		return errors.New("there is no such node: `egret get nodes` lists them")
	}
	return nil
}

// Drain cordons a node and, unless patience is 0, waits until it holds no pool IP any more, reporting each that leaves to w. An error
// names what is left, and why; the cordon stays. Static egress IPs stay too: they are where their address is.
func Drain(ctx context.Context, c *store.Client, node string, patience time.Duration, w io.Writer) error {
	all, err := cordon(ctx, c, node, w)
	if err != nil {
		return err
	}
	ips := slices.SortedFunc(maps.Keys(all.Owners), netip.Addr.Compare)
	ips = slices.DeleteFunc(ips, func(ip netip.Addr) bool { return all.Owners[ip].Node != node || poolOf(&all.Snapshot, ip) == "" })
	fmt.Fprintf(w, "%s: %d egress IPs to give away\n", node, len(ips))
	if len(ips) == 0 || patience == 0 {
		return nil
	}
	watch, stop := context.WithCancel(ctx)
	owners := c.NewCache(store.OwnerPrefix)
	done := make(chan error, 1)
	go func() { done <- owners.Run(watch) }()
	defer func() { stop(); <-done }()
	left, err := waitEmpty(ctx, owners, node, ips, patience, w)
	if err == nil {
		fmt.Fprintf(w, "%s: drained\n", node)
		return nil
	}
	if now, rerr := c.ReadAll(ctx); rerr == nil {
		all = now
	}
	reasons := []error{fmt.Errorf("draining %s: %d egress IPs left: %w", node, len(left), err)}
	for _, ip := range left {
		reasons = append(reasons, fmt.Errorf("%s: %s", ip, stuck(&all.Snapshot, node, ip)))
	}
	return errors.Join(reasons...)
}

// waitEmpty returns when the node holds none of the IPs, or with those that it still holds.
func waitEmpty(ctx context.Context, c *store.Cache, node string, ips []netip.Addr, patience time.Duration, w io.Writer) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	all, ready := len(ips), c.Ready()
	for {
		select {
		case <-ready:
			ips = slices.DeleteFunc(slices.Clone(ips), func(ip netip.Addr) bool {
				var o egress.Owner
				if r, owned := c.Get(store.OwnerKey(ip)); owned {
					var err error
					if o, err = store.DecodeOwner(r); err != nil || o.Node == node {
						return false
					}
				}
				fmt.Fprintf(w, "%s: %s -> %s\n", ip, node, nobody(o.Node))
				return true
			})
			if len(ips) == 0 {
				return nil, nil
			}
		default:
		}
		select {
		case <-c.Changed():
		case <-ctx.Done():
			return ips, fmt.Errorf("%d of %d have left within %v", all-len(ips), all, patience)
		}
	}
}

// stuck says why an IP does not leave a cordoned node.
func stuck(s *egress.Snapshot, node string, ip netip.Addr) string {
	if _, alive := s.Agents[node]; !alive {
		return "the node's agent is down"
	}
	_, to := plan.Leaving(s, plan.Facts{Node: node})
	if len(to) > 0 || len(s.Moves) > 0 {
		return "it waits for its turn, or its target does not get ready: the logs of the agents say more"
	}
	pool := poolOf(s, ip)
	candidates := plan.Candidates(s, pool)
	if len(candidates) == 0 {
		return fmt.Sprintf("no other node that pool %s selects has a live agent and is not cordoned", pool)
	}
	return fmt.Sprintf("%s may hold no more egress IPs", strings.Join(candidates, ", "))
}

// poolOf returns the pool of an egress IP; empty: it is static, or unused.
func poolOf(s *egress.Snapshot, ip netip.Addr) string {
	for _, p := range s.Egresses {
		for _, a := range p.Addresses {
			if a.IP == ip {
				return a.Pool
			}
		}
	}
	return ""
}
