package operator

import (
	"context"
	"errors"
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

// MoveConfig says what to move where.
type MoveConfig struct {
	IP       netip.Addr
	To       string
	Patience time.Duration // how long to wait before the request is withdrawn
	Pin      bool          // the target is the IP's preferred node from then on
	Force    bool          // also beyond the target's capacity, and away from the node that the IP is pinned to
}

// Move moves an IP, and the other IP of its egress, in a planned move, in which no packet is lost, and reports its
// steps to w. It returns when the target holds them, or with an error that says what kept it from doing so; a request
// that did not come true in time is withdrawn.
func Move(ctx context.Context, c *store.Client, cfg MoveConfig, w io.Writer) error {
	all, err := c.ReadAll(ctx)
	if err != nil {
		return err
	}
	ip, to := cfg.IP, cfg.To
	for _, ip := range plan.New(&all.Snapshot).Together(ip) {
		if err == nil {
			err = refusal(&all.Snapshot, ip, to)
		}
	}
	if err == nil && !cfg.Force {
		err = objection(&all.Snapshot, cfg)
	}
	if err != nil {
		return fmt.Errorf("moving %s to %s: %w", ip, to, err)
	}
	if moving := elsewhere(&all.Snapshot, ip, to); len(moving) == 0 {
		fmt.Fprintf(w, "%s is on %s already\n", ip, to)
	} else if err := move(ctx, c, cfg, moving, all.Owners, w); err != nil {
		return fmt.Errorf("moving %s to %s: %w", ip, to, err)
	}
	if !cfg.Pin {
		return nil
	}
	if err := c.Pin(ctx, egress.Pin{IP: ip, Node: to}); err != nil {
		return err
	}
	fmt.Fprintf(w, "%s: pinned to %s\n", ip, to)
	return nil
}

// Forced says what speaks against a move that MoveConfig.Force makes all the same; "": nothing does.
func Forced(ctx context.Context, c *store.Client, cfg MoveConfig) (string, error) {
	all, err := c.ReadAll(ctx)
	if err != nil {
		return "", err
	}
	against := objection(&all.Snapshot, cfg)
	if against == nil {
		return "", nil
	}
	text, _, _ := strings.Cut(against.Error(), "; --force")
	return fmt.Sprintf("%s moves to %s, and this speaks against it: %s.", cfg.IP, cfg.To, text), nil
}

// Unpin drops the pin of an IP. The IP stays where it is.
func Unpin(ctx context.Context, c *store.Client, ip netip.Addr, w io.Writer) error {
	ok, err := c.Unpin(ctx, ip)
	if err != nil {
		return err
	}
	if ok {
		fmt.Fprintf(w, "%s: unpinned\n", ip)
	} else {
		fmt.Fprintf(w, "%s is not pinned\n", ip)
	}
	return nil
}

func move(ctx context.Context, c *store.Client, cfg MoveConfig, ips []netip.Addr, owners map[netip.Addr]egress.Owner, w io.Writer) error {
	to, patience := cfg.To, cfg.Patience
	start := time.Now()
	watch, stop := context.WithCancel(ctx)
	defer stop()
	cache := c.NewCache(store.OwnerPrefix, store.AgentKey(to))
	done := make(chan error, 1)
	go func() { done <- cache.Run(watch) }()
	var moves []egress.Move
	for _, ip := range ips {
		moves = append(moves, egress.Move{IP: ip, To: to, Since: start.UTC(), Force: cfg.Force})
	}
	request, err := c.RequestMoves(ctx, patience, moves...)
	if err != nil {
		return err
	}
	for _, ip := range ips {
		fmt.Fprintf(w, "%s: asked %s to prepare and %s to hand over\n", ip, to, nobody(owners[ip].Node))
	}
	for _, ip := range ips {
		if err = waitOwner(ctx, cache, ip, to, patience-time.Since(start)); err != nil {
			if !errors.Is(err, errRestarts) {
				err = fmt.Errorf("not done within %v (`egret get owners`, and the logs of both agents, say more)", patience)
			}
			err = fmt.Errorf("%s: %w", ip, err)
			break
		}
		fmt.Fprintf(w, "%s: %s -> %s in %v\n", ip, nobody(owners[ip].Node), to, time.Since(start).Round(time.Millisecond))
	}
	stop()
	<-done
	// Whatever is left of the request must not come true behind the operator's back: not after an error, nor when the
	// target claimed the IP because its owner died.
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	rerr := request.Revoke(end)
	if err != nil && rerr != nil {
		return fmt.Errorf("%w; the request stays for up to %v: %w", err, patience, rerr)
	}
	if err != nil {
		return fmt.Errorf("%w; the request is withdrawn", err)
	}
	return nil
}

// errRestarts says that a node takes no IP at present.
var errRestarts = errors.New("the node's agent restarts, or is down: ask again when it is back (`egret get nodes`)")

// refusal says why a node may not own an IP, also with --force; nil: it may.
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
	_, known := s.Nodes[to]
	agent, alive := s.Agents[to]
	switch {
	case !used:
		return fmt.Errorf("no egress uses this IP: `egret get egresses` lists them")
	case pool == "":
		return fmt.Errorf("it is a static egress IP, held by the node that has it on a link")
	case !known:
		return fmt.Errorf("there is no such node: `egret get nodes` lists them")
	case !alive:
		return fmt.Errorf("the node's agent is down")
	case agent.Restarting:
		return errRestarts
	case !slices.Contains(plan.New(s).Candidates(pool), to):
		if plan.Cordoned(s, to) {
			return fmt.Errorf("the node is cordoned: `egret uncordon %s`, or kubectl uncordon", to)
		}
		return fmt.Errorf("pool %s does not select the node; it selects %s", pool, nobody(strings.Join(plan.New(s).Candidates(pool), ", ")))
	}
	return nil
}

// elsewhere returns the IPs to move: of ip and the other IP of its egress those that the node does not own.
func elsewhere(s *egress.Snapshot, ip netip.Addr, to string) []netip.Addr {
	return slices.DeleteFunc(plan.New(s).Together(ip), func(ip netip.Addr) bool { return s.Owners[ip].Node == to })
}

// objection says what speaks against a move that the operator can make all the same, with --force; nil: nothing.
func objection(s *egress.Snapshot, cfg MoveConfig) error {
	if len(elsewhere(s, cfg.IP, cfg.To)) > plan.New(s).FreeCapacity(cfg.To) {
		return fmt.Errorf("the node holds %d egress IPs and may hold %d; --force moves it all the same", plan.New(s).Owned(cfg.To), s.Nodes[cfg.To].Capacity)
	}
	for _, ip := range plan.New(s).Together(cfg.IP) {
		pin, pinned := s.Pins[ip]
		switch {
		case !pinned || pin.Node == cfg.To:
		case ip != cfg.IP:
			return fmt.Errorf("%s, which moves with it, is pinned to %s: `egret unpin %s`; --force moves them all the same, until they are placed anew", ip, pin.Node, ip)
		case !cfg.Pin:
			return fmt.Errorf("it is pinned to %s: `egret unpin %s`, or --pin to pin it to %s; --force moves it all the same", pin.Node, cfg.IP, cfg.To)
		}
	}
	return nil
}

// waitOwner returns when the node is the owner of ip, or its agent is not there to become it: errRestarts.
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
		case <-c.Ready():
			r, alive := c.Get(store.AgentKey(node))
			if a, err := store.Decode[egress.Agent](r); !alive || err == nil && a.Restarting {
				return errRestarts
			}
		default:
		}
		select {
		case <-c.Changed():
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func nobody(node string) string {
	if node == "" {
		return "nobody"
	}
	return Printable(node, longest) // by a record, which others write
}
