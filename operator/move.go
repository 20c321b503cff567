package operator

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// Move moves ip to the node in a planned move, in which no packet is lost, and reports its steps to w. It returns when the node holds
// the IP, or with an error that says what kept it from doing so; a request that did not come true in time is withdrawn.
func Move(ctx context.Context, c *store.Client, ip netip.Addr, to string, patience time.Duration, w io.Writer) error {
	all, err := c.ReadAll(ctx)
	if err != nil {
		return err
	}
	owner, owned := all.Owners[ip]
	if owned && owner.Node == to {
		fmt.Fprintf(w, "%s is on %s already\n", ip, to)
		return nil
	}
	if err := refusal(&all.Snapshot, ip, to); err != nil {
		return fmt.Errorf("moving %s to %s: %w", ip, to, err)
	}
	start := time.Now()
	watch, stop := context.WithCancel(ctx)
	defer stop()
	owners := c.NewCache(store.OwnerKey(ip))
	done := make(chan error, 1)
	go func() { done <- owners.Run(watch) }()
	request, err := c.RequestMove(ctx, egress.Move{IP: ip, To: to, Since: start.UTC()}, patience)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "%s: asked %s to prepare and %s to hand over\n", ip, to, nobody(owner.Node))
	err = waitOwner(ctx, owners, ip, to, patience)
	stop()
	<-done
	// Whatever is left of the request must not come true behind the operator's back: not after an error, nor when the target claimed the
	// IP because its owner died.
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	rerr := request.Revoke(end)
	if err != nil && rerr != nil {
		return fmt.Errorf("moving %s to %s: %w; the request stays for up to %v: %w", ip, to, err, patience, rerr)
	}
	if err != nil {
		return fmt.Errorf("moving %s to %s: %w; the request is withdrawn", ip, to, err)
	}
	fmt.Fprintf(w, "%s: %s -> %s in %v\n", ip, nobody(owner.Node), to, time.Since(start).Round(time.Millisecond))
	return nil
}

// refusal says why a node may not hold an IP; nil: it may.
func refusal(s *egress.Snapshot, ip netip.Addr, to string) error {
	var pool string
	used := false
	for _, p := range s.Egresses {
		for _, a := range p.Addresses {
			if a.IP == ip {
				pool, used = a.Pool, true
			}
		}
	}
	n, known := s.Nodes[to]
	_, alive := s.Agents[to]
	held := 0
	for _, o := range s.Owners {
		if o.Node == to {
			held++
		}
	}
	switch capacity := plan.Capacity(s, to, 0); {
	case !used:
		return fmt.Errorf("no egress uses this IP: `egret get egresses` lists them")
	case pool == "":
		return fmt.Errorf("it is a static egress IP, held by the node that has it on a link")
	case !known:
		return fmt.Errorf("there is no such node: `egret get nodes` lists them")
	case !alive:
		return fmt.Errorf("the node's agent is down")
	case !slices.Contains(plan.Candidates(s, pool), to):
		if s.Pools[pool].NodeSelector.Matches(n.Labels) {
			return fmt.Errorf("the node is cordoned")
		}
		return fmt.Errorf("pool %s does not select the node; it selects %s", pool, nobody(strings.Join(plan.Candidates(s, pool), ", ")))
	case capacity > 0 && held >= capacity:
		return fmt.Errorf("the node holds %d egress IPs, as many as it may", held)
	}
	return nil
}

// waitOwner returns when the node is the owner of ip.
func waitOwner(ctx context.Context, c *store.Cache, ip netip.Addr, node string, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		if r, ok := c.Get(store.OwnerKey(ip)); ok {
			if o, err := store.DecodeOwner(r); err == nil && o.Node == node {
				return nil
			}
		}
		select {
		case <-c.Changed():
		case <-ctx.Done():
			return fmt.Errorf("not done within %v (`egret get owners`, and the logs of both agents, say more)", patience)
		}
	}
}

func nobody(node string) string {
	if node == "" {
		return "nobody"
	}
	return node
}
