package operator

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// Holder is a node that had the port at the time.
type Holder struct {
	Node   string    `json:"node"`
	Egress string    `json:"egress,omitempty"`
	First  uint16    `json:"first,omitempty"`
	Last   uint16    `json:"last,omitempty"`
	Since  time.Time `json:"since,omitzero"`
	Until  time.Time `json:"until,omitzero"` // none: it has it
	// Gateway says that the port is of those by which the gateway translates for nodes without a block: its own, or
	// another's pods.
	Gateway bool `json:"gateway,omitempty"`
	// Resting says that the node had lost the block by then, and the port rested: what had it before may still have
	// been under way.
	Resting bool `json:"resting,omitempty"`
}

// whoHeld returns which nodes had the port, by etcd, and why that may not be all.
func whoHeld(ctx context.Context, c *store.Client, cfg WhoConfig) (holders []Holder, nodes map[string]egress.Node, missing []string, err error) {
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
	owners, err := c.History(ctx, cfg.IP)
	if err != nil {
		missing = append(missing, err.Error())
	}
	for _, f := range append(bad, worse...) {
		missing = append(missing, fmt.Sprintf("record %s could not be read: %v", f.Key, f.Err))
	}
	name, since := "", time.Time{}
	for _, a := range all.Allocations {
		if a.IP == cfg.IP {
			name, since = strings.Join(a.Egresses, ","), a.Since
		}
	}
	if name == "" && len(blocks) == 0 && len(former) == 0 && len(owners) == 0 {
		return nil, nil, nil, fmt.Errorf("%s is no egress IP, and was none as far as etcd remembers: egret get allocations lists them", cfg.IP)
	}
	nodes = all.Nodes
	if cfg.Port < egress.FirstBlockPort {
		holders = gateways(cfg, owners, name)
		if len(holders) == 0 {
			missing = append(missing, "who was the gateway then is not known: etcd remembers the last changes of it")
		}
		return holders, nodes, missing, nil
	}
	first := time.Now()
	if !since.IsZero() && since.Before(first) {
		first = since // no node had a block of the IP before it was allocated
	}
	tenures := former
	for _, b := range blocks {
		tenures = append(tenures, b.Tenure())
	}
	for _, t := range tenures {
		if !t.Ports(cfg.Port) {
			continue
		}
		h := Holder{Node: t.Node, Egress: cmp.Or(t.Egress, name), First: t.First, Last: t.First + uint16(t.Size-1), Since: t.Since, Until: t.Until}
		switch {
		case t.Since.Before(cfg.To) && (t.Until.IsZero() || t.Until.After(cfg.From)):
			holders = append(holders, h)
		case t.Since.Before(cfg.To) && t.Until.Add(clockSlack).After(cfg.From):
			h.Resting = true
			holders = append(holders, h)
		}
	}
	if len(holders) == 0 && cfg.From.Before(first) {
		missing = append(missing, fmt.Sprintf("etcd does not remember whose ports of %s were whose before %s", cfg.IP, stamp(first)))
	}
	slices.SortFunc(holders, func(a, b Holder) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Node, b.Node)) })
	return holders, nodes, missing, nil
}

// clockSlack is how long after a node lost a block it is still asked: its connections are ended then, and clocks
// differ.
const clockSlack = 2 * time.Minute

// gateways returns the owners of the IP at the time.
func gateways(cfg WhoConfig, owners []egress.Tenure, name string) (out []Holder) {
	for i, t := range owners {
		h := Holder{Node: t.Node, Egress: name, First: egress.StatefulPort, Last: egress.FirstBlockPort - 1, Since: t.Since, Gateway: true}
		if i+1 < len(owners) {
			h.Until = owners[i+1].Since
		}
		if h.Node != "" && h.Since.Before(cfg.To) && (h.Until.IsZero() || h.Until.After(cfg.From)) {
			out = append(out, h)
		}
	}
	return out
}
