package nft

import (
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Guarded returns the ids of the egress IPs of which the guard dropped packets, with the time since the last one: what
// was about to leave with another source than a permitted egress IP. One that had none for 30 s is left out. It is
// empty when the tables are absent.
func (t *Tables) Guarded() (map[egress.ID]time.Duration, error) {
	list, err := t.dumpSet(table{family: nftables.TableFamilyINet, name: egress.TableName}, "guarded")
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("reading what the guard dropped: %w", err)
	}
	out := map[egress.ID]time.Duration{}
	for _, e := range list {
		if len(e.key) == 4 && e.left > 0 {
			out[idOf(e)] = guardedFor - e.left
		}
	}
	return out, nil
}

// idOf returns the id in the key of an element, which is the mark of a connection.
func idOf(e element) egress.ID {
	return egress.ID(markOf(mark.wire(e.key)) & egress.Mark(egress.MaxID))
}
