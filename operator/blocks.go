package operator

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// KindBlocks is the kind that Blocks lists, and Get as well.
const KindBlocks = "blocks"

// Blocks writes the blocks of ports of an egress IP, or of all where ip is the zero Addr, as Get writes records.
func Blocks(ctx context.Context, c *store.Client, ip netip.Addr, format string, w io.Writer) error {
	if err := Check(KindBlocks, format); err != nil {
		return err
	}
	blocks, faults, err := readBlocks(ctx, c, ip)
	if err != nil {
		return err
	}
	if err := listBlocks(blocks, time.Now()).write(format, w); err != nil {
		return err
	}
	return unread(faults)
}

// blockUse is a block, and what its node asks for in its place; nothing, where that is enough.
type blockUse struct {
	egress.Block
	Used int `json:"used,omitempty"` // as egress.PortUse has it
	Want int `json:"want,omitempty"`
}

// readBlocks reads the blocks of an egress IP, or of all where ip is the zero Addr, and those that cannot be read.
func readBlocks(ctx context.Context, c *store.Client, ip netip.Addr) (out []blockUse, faults []egress.Fault, err error) {
	blocks, faults, err := c.Blocks(ctx, ip)
	if err != nil {
		return nil, nil, err
	}
	all, err := c.ReadAll(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, b := range blocks {
		u := blockUse{Block: b}
		if use := all.Agents[b.Node].Ports[b.IP]; b.Freed.IsZero() && !b.Retired && use.Want != b.Size {
			u.Used, u.Want = use.Used, use.Want
		}
		out = append(out, u)
	}
	return out, faults, nil
}

func listBlocks(blocks []blockUse, now time.Time) listing {
	l := listing{kind: KindBlocks, header: "IP PORTS SIZE NODE STATE SINCE IN-USE WANTS"}
	for _, b := range blocks {
		state, since := stateOf(b.Block)
		use := "-"
		if b.Want > 0 {
			use = strconv.Itoa(b.Used)
		}
		l.records = append(l.records, b)
		l.rows = append(l.rows, []string{
			b.IP.String(), fmt.Sprintf("%d-%d", b.First, b.Last()), strconv.Itoa(b.Size), b.Node, state, age(now, since), use, limit(b.Want),
		})
	}
	return l
}

// stateOf says what a block is for at present, and since when it is the node's, or rests.
func stateOf(b egress.Block) (state string, since time.Time) {
	switch {
	case !b.Freed.IsZero():
		return "resting", b.Freed
	case b.Retired:
		return "retired", b.Since
	}
	return "used", b.Since
}
