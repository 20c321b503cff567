package nft

import (
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// openedFor is for how long the count of an egress IP that gets no new connections is kept.
const openedFor = time.Hour

// opens counts a new connection of an egress IP. Only the first packet of a connection comes by here.
func opens() term {
	return words(fmt.Sprintf("update @opened { ct mark timeout %dms counter }", openedFor.Milliseconds()),
		markOfConnection.load, &expr.Dynset{SrcRegKey: reg, SetName: "opened", Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: openedFor,
			Exprs: []expr.Any{&expr.Counter{}}})
}

// Opened returns how many connections of each egress IP this node's pods have opened, by its id, tried ones included. A
// count begins anew when the tables are made anew, and after an hour without a connection; one that is left out may be
// there the next time. It is empty when the tables are absent.
func (t *Tables) Opened() (map[egress.ID]uint64, error) {
	list, err := t.dumpSet(table{family: nftables.TableFamilyINet, name: egress.TableName}, "opened")
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("reading how many connections were opened: %w", err)
	}
	out := map[egress.ID]uint64{}
	for _, e := range list {
		if len(e.key) == 4 {
			out[idOf(e)] = e.packets
		}
	}
	return out, nil
}
