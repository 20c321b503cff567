package operator

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// Holder is a node that had the port at the time.
type Holder struct {
	Node   string `json:"node"`
	Egress string `json:"egress,omitempty"`
	// First and Last are the lowest and the highest port that it has; none: the question is of its overlay address.
	First uint16    `json:"first,omitempty"`
	Last  uint16    `json:"last,omitempty"`
	Since time.Time `json:"since,omitzero"`
	Until time.Time `json:"until,omitzero"` // none: it has it
	// Gateway says that the port is of those by which the gateway translates for nodes without a block: its own, or
	// another's pods.
	Gateway bool `json:"gateway,omitempty"`
	// Resting says that the node had lost the block by then, and the port rested: what had it before may still have
	// been under way.
	Resting bool `json:"resting,omitempty"`
}

// whoHeld returns which nodes had the port, by etcd, and why that may not be all.
func whoHeld(ctx context.Context, c *store.Client, cfg WhoConfig) (holders []Holder, nodes map[string]egress.Node, missing []string, err error) {
	if index, ok := egress.IndexOfSource(cfg.IP); ok {
		all, err := c.ReadAll(ctx)
		if err != nil {
			return nil, nil, nil, err
		}
		for name, n := range all.Nodes {
			if n.Index == index {
				return []Holder{{Node: name}}, all.Nodes, nil, nil
			}
		}
		return nil, nil, nil, fmt.Errorf("%s is an address of the node with the index %d, which is gone", cfg.IP, index)
	}
	blocks, bad, err := c.Blocks(ctx, cfg.IP)
	if err != nil {
		return nil, nil, nil, err
	}
	former, worse, err := c.BlockHistory(ctx, cfg.IP)
	if err != nil {
		return nil, nil, nil, err
	}
	all, err := c.ReadAll(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	r := remembered{tenures: former}
	if r.owners, err = c.History(ctx, cfg.IP); err != nil {
		missing = append(missing, err.Error())
	}
	for _, f := range append(bad, worse...) {
		missing = append(missing, fmt.Sprintf("record %s could not be read: %v", f.Key, f.Err))
	}
	for _, a := range all.Allocations {
		if a.IP == cfg.IP {
			r.egress, r.since = strings.Join(a.Egresses, ","), a.Since
		}
	}
	for _, b := range blocks {
		r.tenures = append(r.tenures, b.Tenure())
	}
	if r.egress == "" && len(r.tenures) == 0 && len(r.owners) == 0 {
		return nil, nil, nil, fmt.Errorf("%s is no egress IP, and was none as far as etcd remembers: egret get allocations lists them", cfg.IP)
	}
	holders, more := r.holders(cfg)
	return holders, all.Nodes, append(missing, more...), nil
}

// remembered is what etcd has of an egress IP.
type remembered struct {
	egress  string               // whose it is, of a static IP several; "": nobody's
	since   time.Time            // when it was allocated; zero: it is not
	tenures []egress.BlockTenure // whose its ports are and were
	owners  []egress.Tenure      // the oldest first
}

// holders returns the nodes that had the port, and why that may not be all.
func (r remembered) holders(cfg WhoConfig) (holders []Holder, missing []string) {
	for _, t := range r.tenures {
		if !t.Ports(cfg.Port) {
			continue
		}
		h := Holder{Node: t.Node, Egress: cmp.Or(t.Egress, r.egress), First: t.First, Last: t.First + uint16(t.Size-1), Since: t.Since, Until: t.Until}
		switch begun := cfg.begun(t.Since); {
		case begun && (t.Until.IsZero() || t.Until.After(cfg.From)):
			holders = append(holders, h)
		case begun && t.Until.Add(clockSlack).After(cfg.From):
			h.Resting = true
			holders = append(holders, h)
		}
	}
	first := time.Now()
	if !r.since.IsZero() && r.since.Before(first) {
		first = r.since // no node had a block of the IP before it was allocated
	}
	if len(holders) == 0 && cfg.Port >= egress.FirstBlockPort && cfg.From.Before(first) {
		missing = append(missing, fmt.Sprintf("etcd does not remember whose ports of %s were whose before %s", cfg.IP, stamp(first)))
	}
	if lowest, highest := r.ofGateway(cfg); lowest <= cfg.Port && cfg.Port <= highest {
		gateways := r.gateways(cfg, lowest, highest)
		if holders = append(holders, gateways...); len(gateways) == 0 {
			missing = append(missing, "who was the gateway then is not known: etcd remembers the last changes of it")
		}
	}
	slices.SortFunc(holders, func(a, b Holder) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Node, b.Node)) })
	return holders, missing
}

// clockSlack is how long after a node lost a block it is still asked, and how long before it got one: its connections
// are ended then, and clocks differ.
const clockSlack = 2 * time.Minute

// begun reports whether what is so since a time, by another clock, may have been so at the time in question.
func (cfg WhoConfig) begun(since time.Time) bool {
	return cfg.Now || since.Add(-clockSlack).Before(cfg.To)
}

// ofGateway returns the lowest and the highest port that the gateway translates to: where nodes have blocks of the IP
// those below all blocks, else any. Static IPs have no blocks, nor has any with --block-size 0: a connection has its
// pod's port then where that is free, also one below egress.StatefulPort.
func (r remembered) ofGateway(cfg WhoConfig) (lowest, highest uint16) {
	for _, t := range r.tenures {
		if cfg.Now && t.Until.IsZero() || !t.Since.After(cfg.From.Add(-clockSlack)) && (t.Until.IsZero() || !t.Until.Before(cfg.To.Add(clockSlack))) {
			return egress.StatefulPort, egress.FirstBlockPort - 1
		}
	}
	return 1, math.MaxUint16
}

// gateways returns the owners of the IP at the time.
func (r remembered) gateways(cfg WhoConfig, lowest, highest uint16) (out []Holder) {
	for i, t := range r.owners {
		h := Holder{Node: t.Node, Egress: r.egress, First: lowest, Last: highest, Since: t.Since, Gateway: true}
		if i+1 < len(r.owners) {
			h.Until = r.owners[i+1].Since
		}
		if h.Node != "" && cfg.begun(h.Since) && (h.Until.IsZero() || h.Until.Add(clockSlack).After(cfg.From) && !cfg.Now) {
			out = append(out, h)
		}
	}
	return out
}
