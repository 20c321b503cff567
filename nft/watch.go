package nft

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Watch calls changed after every commit that changed something of our tables and was not made by t, beginning with those since New,
// until ctx ends, and returns nil then. Several commits in a row may be one call. When the kernel had to drop events, that counts as
// a change. changed must not block. Only one Watch may run at a time.
//
// Commits of t are told apart by the netlink port that they came from. The process id that the kernel reports is that of a thread,
// and in the first pid namespace: an agent in a container would not know its own.
func (t *Tables) Watch(ctx context.Context, changed func()) error {
	if err := t.watch.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("watching nftables: %w", err)
	}
	// A deadline ends the blocked read; the socket stays usable.
	stop := context.AfterFunc(ctx, func() { t.watch.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		msgs, err := t.watch.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			changed()
			continue
		case err != nil:
			return fmt.Errorf("watching nftables: %w", err)
		}
		for _, m := range msgs {
			if t.concerned(m) {
				changed()
				break
			}
		}
	}
}

// concerned reports whether an event of the nftables group says that someone else changed one of our tables. The name of the table is
// the first attribute of every event of nf_tables but the one that ends a commit, which has none.
func (t *Tables) concerned(m netlink.Message) bool {
	if m.Header.PID == t.write.nl.PID() || len(m.Data) < 4 {
		return false
	}
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || m.Header.Type&0xff == unix.NFT_MSG_NEWGEN {
		return false
	}
	switch nftables.TableFamily(m.Data[0]) {
	case nftables.TableFamilyINet, nftables.TableFamilyARP, nftables.TableFamilyNetdev:
	default:
		return false
	}
	a, err := decode(m.Data[4:])
	return err != nil || a.string(unix.NFTA_TABLE_NAME) == egress.TableName // what cannot be read may be ours
}
