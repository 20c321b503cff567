package gateway

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// The faults that can happen to the owner of an egress IP.
const (
	PowerOff = "power-off" // it is powered off
	Uplink   = "uplink"    // its uplink loses its carrier
	Drain    = "drain"     // it is drained
	Move     = "move"      // its IP is moved to the next node
	Moves    = "moves"     // its IP is moved three times in three seconds, from node to node
	Restart  = "restart"   // its agent is stopped (SIGTERM), and started again at once
	Kill     = "kill"      // its agent is killed (SIGKILL), and is not started before another node has the IP
	Respawn  = "respawn"   // its agent is killed (SIGKILL), and started again at once
)

// Joining is how long a node that was away is given: the agents' gossip calls those that it misses every second.
const Joining = 3 * time.Second

// Fault is one of the faults, for one node.
type Fault struct {
	Inject, Mend func(context.Context) error
	NewOwner     bool          // the IP has another owner after it
	Settle       time.Duration // how long after Mend the lab takes until all is as before
}

// Fault returns what makes a fault happen to a node, the owner of the IP, and what mends it. nodes are those that a
// moved IP goes around.
func (g *Gateway) Fault(name, node string, nodes []string) (Fault, error) {
	egret := func(args ...string) func(context.Context) error {
		return func(ctx context.Context) error {
			if out, err := g.lab.Egret(ctx, args...); err != nil {
				return fmt.Errorf("egret %q: %w\n%s", args, err, out)
			}
			return nil
		}
	}
	of := func(change func(*lab.Lab, context.Context, string) error) func(context.Context) error {
		return func(ctx context.Context) error { return change(g.lab, ctx, node) }
	}
	with := func(change func(*lab.Lab, context.Context, string, string) error, a, b string) func(context.Context) error {
		return func(ctx context.Context) error { return change(g.lab, ctx, a, b) }
	}
	start := with((*lab.Lab).Start, "agent", node)
	nothing := func(context.Context) error { return nil }
	switch name {
	case PowerOff:
		return Fault{of((*lab.Lab).Crash), of((*lab.Lab).Recover), true, Joining}, nil
	case Uplink:
		return Fault{with((*lab.Lab).Cut, node, "uplink"), with((*lab.Lab).Heal, node, "uplink"), true, Joining}, nil
	case Drain:
		return Fault{egret("drain", node, "--wait"), egret("uncordon", node), true, 0}, nil
	case Move:
		return Fault{egret("move", g.ip.String(), "--to", after(nodes, node, 1)), nothing, true, 0}, nil
	case Moves:
		var moves []func(context.Context) error
		for i := range 3 {
			moves = append(moves, egret("move", g.ip.String(), "--to", after(nodes, node, i+1)))
		}
		return Fault{everySecond(moves), nothing, after(nodes, node, 3) != node, 0}, nil
	case Restart:
		return Fault{inTurn(with((*lab.Lab).Stop, "agent", node), start), nothing, false, Joining}, nil
	case Kill:
		return Fault{with((*lab.Lab).Kill, "agent", node), start, true, Joining}, nil
	case Respawn:
		return Fault{inTurn(with((*lab.Lab).Kill, "agent", node), start), nothing, false, Joining}, nil
	}
	return Fault{}, fmt.Errorf("fault %q: there is no such", name)
}

// after returns the node n places after another one, around.
func after(nodes []string, node string, n int) string {
	for i := range nodes {
		if nodes[i] == node {
			return nodes[(i+n)%len(nodes)]
		}
	}
	return nodes[0]
}

// inTurn does one after the other, also when one fails.
func inTurn(all ...func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) (err error) {
		for _, f := range all {
			err = errors.Join(err, f(ctx))
		}
		return err
	}
}

// everySecond begins one each second.
func everySecond(all []func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		begin := time.Now()
		for i, f := range all {
			if err := Sleep(ctx, time.Until(begin.Add(time.Duration(i)*time.Second))); err != nil {
				return err
			}
			if err := f(ctx); err != nil {
				return err
			}
		}
		return nil
	}
}
