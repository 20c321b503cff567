// Etcd is a member of the oldest etcd that docs/install.md names, for labs: NAME DATADIR CLIENTURL PEERURL CLUSTER.
package main

import (
	"fmt"
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	if len(os.Args) != 6 {
		fmt.Fprintf(os.Stderr, "want NAME DATADIR CLIENTURL PEERURL CLUSTER, got %q\n", os.Args[1:])
		os.Exit(2)
	}
	name, data, client, peer, cluster := os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]
	etcdmain.Main([]string{
		"etcd", "--name", name, "--data-dir", data, "--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", cluster, "--unsafe-no-fsync", "--log-level", "warn",
	})
}
