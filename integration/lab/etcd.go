package lab

import (
	"context"
	"fmt"
	"net/url"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// runEtcd is a single etcd server until ctx ends: NAME DATADIR CLIENTURL PEERURL.
func runEtcd(ctx context.Context, args []string) error {
	if len(args) != 4 {
		return fmt.Errorf("want NAME DATADIR CLIENTURL PEERURL, got %q", args)
	}
	client, err := url.Parse(args[2])
	if err != nil {
		return err
	}
	peer, err := url.Parse(args[3])
	if err != nil {
		return err
	}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = args[0], args[1]
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.UnsafeNoFsync = true // the data need not outlive the machine
	cfg.LogLevel = "warn"
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case err := <-e.Err():
		return err
	}
	// Close waits for every open watch of its clients; what is committed is written already, so a second is patience enough.
	closed := make(chan struct{})
	go func() { e.Close(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(time.Second):
	}
	return nil
}
