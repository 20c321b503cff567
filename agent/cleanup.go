package agent

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/inject"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/routing"
	"github.com/egret-project/egret/vlan"
)

// Cleanup removes from the network namespace of the calling thread all that agents have made there, and nothing of
// others; that there is nothing is no error. Selected pods then leave as the CNI has it: their open connections start
// afresh. It refuses while an agent runs, which would put everything back, and keeps one from starting meanwhile. In
// etcd, the locks of the node's last agent end with its lease. sysctl is Config.Sysctl.
func Cleanup(sysctl string, log *slog.Logger) error {
	lock, err := lockNode(log)
	if err != nil {
		return fmt.Errorf("%w: stop it first", err)
	}
	if lock != nil {
		defer lock.Close()
	}
	links, err := vlan.New(vlan.Config{Log: log, Sysctl: sysctl})
	if err != nil {
		return err
	}
	defer links.Close()
	router, err := routing.New(routing.Config{Log: log})
	if err != nil {
		return err
	}
	defer router.Close()
	tables, err := nft.New(nft.Config{Log: log})
	if err != nil {
		return err
	}
	defer tables.Close()

	// The tables come last: without them the kernel would answer for addresses that are still there, and what comes out
	// of the overlay would leave with the node's own address.
	if err := errors.Join(links.Delete(), router.Delete()); err != nil {
		return fmt.Errorf("cleaning up (the nftables tables stay until this is mended): %w", err)
	}
	return errors.Join(tables.Delete(), inject.Delete(), conntrack.Delete(func(c conntrack.Connection) bool {
		return c.Mark&egress.ConnTagMask == egress.ConnTag
	}))
}
