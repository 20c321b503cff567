package store

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
)

// Whole is all that etcd holds: Everything, the members of all egresses in ByEgress, and what follows.
type Whole struct {
	Everything
	Unselected map[string]egress.Members // the pods that no egress selects, by node
	Blocks     []egress.Block            // sorted by IP and first port
	Leader     string                    // the id of the crdsync that leads; empty: none does
}

// ReadWhole reads all that etcd holds at one revision. Records that cannot be read are in Faults.
func (c *Client) ReadWhole(ctx context.Context) (Whole, error) {
	list, err := c.list(ctx, append(slices.Clone(control), AllocationPrefix, MembersByEgress, MembersByNode, BlockPrefix, CrdsyncElection.prefix()), 0)
	if err != nil {
		return Whole{}, fmt.Errorf("reading etcd: %w", err)
	}
	w := Whole{Unselected: map[string]egress.Members{}}
	t, first := newTables(""), int64(0)
	for key, r := range list.records {
		rest, ofNode := strings.CutPrefix(key, MembersByNode)
		node, name, _ := strings.Cut(rest, "/")
		switch {
		case strings.HasPrefix(key, CrdsyncElection.prefix()):
			if first == 0 || r.Revision < first { // who stands longest leads
				first, w.Leader = r.Revision, string(r.Value)
			}
		case strings.HasPrefix(key, BlockPrefix):
			b, err := DecodeBlock(key, r)
			if err != nil {
				t.faults[key] = egress.Fault{Key: key, Err: err}
				continue
			}
			w.Blocks = append(w.Blocks, b)
		case ofNode && name != egress.Unselected: // the same as by egress
		case ofNode:
			m, err := Decode[egress.Members](r)
			if err == nil {
				err = checkMembers(membersKey{name, node}, m)
			}
			if err != nil {
				t.faults[key] = egress.Fault{Key: key, Err: err}
				continue
			}
			w.Unselected[node] = m
		default:
			t.apply(key, &r, true)
		}
	}
	slices.SortFunc(w.Blocks, CompareBlocks)
	w.Everything = t.everything(list.revision)
	return w, nil
}
