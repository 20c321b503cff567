package store

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/egret-project/egret/egress"
)

// blockTime is the form of times in a BlockHistoryKey, in the order of the times: crdsync's have whole seconds.
const blockTime = "20060102T150405Z"

// Blocks returns the blocks of ports of an egress IP, or of all where ip is the zero Addr, sorted by IP and first port,
// and the records that cannot be read, by key.
func (c *Client) Blocks(ctx context.Context, ip netip.Addr) (blocks []egress.Block, faults []egress.Fault, err error) {
	prefix := BlockPrefix
	if ip.IsValid() {
		prefix += ip.String() + "/"
	}
	records, err := c.List(ctx, prefix)
	if err != nil {
		return nil, nil, fmt.Errorf("reading etcd: %w", err)
	}
	blocks, faults = decodeAll(records, DecodeBlock)
	slices.SortFunc(blocks, CompareBlocks)
	return blocks, faults, nil
}

// BlockHistory returns who had which ports of an egress IP before those who have them now, sorted by when they lost
// them, and the records that cannot be read, by key.
func (c *Client) BlockHistory(ctx context.Context, ip netip.Addr) (tenures []egress.BlockTenure, faults []egress.Fault, err error) {
	records, err := c.List(ctx, BlockHistoryPrefix+ip.String()+"/")
	if err != nil {
		return nil, nil, fmt.Errorf("reading etcd: %w", err)
	}
	tenures, faults = decodeAll(records, DecodeBlockTenure)
	slices.SortStableFunc(tenures, func(a, b egress.BlockTenure) int {
		return cmp.Or(a.Until.Compare(b.Until), cmp.Compare(a.First, b.First))
	})
	return tenures, faults, nil
}

// decodeAll returns what the records say, in the order of their keys, and those that cannot be read.
func decodeAll[T any](records map[string]Record, decode func(key string, r Record) (T, error)) (all []T, faults []egress.Fault) {
	for _, key := range slices.Sorted(maps.Keys(records)) {
		v, err := decode(key, records[key])
		if err != nil {
			faults = append(faults, egress.Fault{Key: key, Err: err})
			continue
		}
		all = append(all, v)
	}
	return all, faults
}

// CompareBlocks orders blocks by IP and first port, as in egress.Members.
func CompareBlocks(a, b egress.Block) int {
	return cmp.Or(a.IP.Compare(b.IP), cmp.Compare(a.First, b.First))
}
