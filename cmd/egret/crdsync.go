package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/egret-project/egret/crdsync"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

func crdsyncCommand() *cobra.Command {
	var (
		etcd                           etcdFlags
		config, kubeconfig, master, id string
		ttl                            time.Duration
		serve                          bool
		webhook                        crdsync.Webhook
		maxEgressIPs                   int
		followCordon                   bool
		startupTaint                   string
		compactAfter                   time.Duration
		defragment                     bool
		cluster                        []string
		blockSize                      int
		blockHistory                   time.Duration
		watched                        monitorFlags
		shown                          pageFlags
		passed                         relay
		logs                           logFlags
	)
	c := &cobra.Command{
		Use:   "crdsync",
		Short: "Mirror Egress and ExternalIPPool objects into etcd, and their status back",
		Long:  "Runs in one or more replicas, of which an election in etcd picks the one that writes. It is the only part that speaks to the\nKubernetes API.",
		Args:  cobra.NoArgs,
	}
	s := c.Flags()
	etcd.add(s)
	host, _ := os.Hostname() // without one, the process id alone tells replicas apart
	s.StringVar(&config, "config", "", "YAML file of these options, without the dashes; the command line wins")
	s.StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig file (default: the pod's service account)")
	s.StringVar(&master, "master", "", "URL of the Kubernetes API, in place of the kubeconfig's")
	s.StringVar(&id, "id", fmt.Sprintf("%s/%d", host, os.Getpid()), "name of this replica in the election")
	s.DurationVar(&ttl, "election-ttl", 10*time.Second, "how long a silent leader stays leader; whole seconds, at least 2s")
	s.BoolVar(&serve, "webhook", false, "answer the API server's questions about objects (needs manifests/deploy/webhook.yaml)")
	s.StringVar(&webhook.Address, "webhook-address", ":9443", "where --webhook listens, host:port")
	s.StringVar(&webhook.Namespace, "namespace", "egret-system", "namespace of the webhook's Service, and of the Secret with its CA")
	s.StringVar(&webhook.ClientCA, "webhook-client-ca-file", "", "file of the CA certificates that clients of --webhook have to show a certificate of (default: whoever reaches it is answered)")
	s.StringSliceVar(&webhook.Clients, "webhook-clients", nil, "common names of these certificates, those of the API servers")
	s.IntVar(&maxEgressIPs, "egress.maxEgressIPsPerNode", 255, "how many egress IPs a node may hold, 1 to 255; the node annotation node.antrea.io/max-egress-ips wins")
	s.BoolVar(&followCordon, "follow-kubernetes-cordon", true, "a node that is cordoned in Kubernetes, or shutting down, gives its egress IPs away and takes none")
	s.StringVar(&startupTaint, "startup-taint", "", "key of a taint that new nodes are registered with, and that is taken off when the node's agent is ready, like egret/agent-not-ready (default: none)")
	s.DurationVar(&compactAfter, "etcd-compact-after", time.Hour, "how long etcd remembers what a key was, 1m at least; older is dropped, of others' keys too; 0: others compact")
	s.BoolVar(&defragment, "etcd-defragment", true, "defragment etcd's members where that pays, one at a time, its leader last, while all are well")
	s.StringSliceVar(&cluster, "cluster-cidrs", nil, "ranges of the cluster's pods, for all agents; crdsync writes down the addresses of pods that are in none of them, nor in their node's podCIDRs")
	s.IntVar(&blockSize, "block-size", 1024, "how many ports of an egress IP a node gets for its own pods at first, a power of two from 64 to 32768; 0: none (docs/ports.md)")
	s.DurationVar(&blockHistory, "block-history", 30*24*time.Hour, "how long etcd remembers which node had which ports, for egret who; 0: not at all (docs/natlog.md)")
	s.StringVar(&passed.address, "etcd-relay-address", "", fmt.Sprintf("loopback address at which connections are passed on to etcd, for egret --kubeconfig: 127.0.0.1:%d (default: none)", egress.EtcdRelayPort))
	watched.add(s, egress.SyncStatusPort)
	shown.add(s)
	logs.add(s)
	c.RunE = configured(&config, func(c *cobra.Command, _ []string) error {
		log, level, err := logs.logger(os.Stderr)
		if ttl < 2*time.Second || ttl%time.Second != 0 {
			err = errors.Join(err, fmt.Errorf("--election-ttl %v: want whole seconds, at least 2s", ttl))
		}
		if maxEgressIPs < 1 || maxEgressIPs > 255 {
			err = errors.Join(err, fmt.Errorf("--egress.maxEgressIPsPerNode %d: want 1 to 255", maxEgressIPs))
		}
		if compactAfter != 0 && compactAfter < time.Minute {
			err = errors.Join(err, fmt.Errorf("--etcd-compact-after %v: want 0, or 1m at least", compactAfter))
		}
		ranges, bad := prefixes("--cluster-cidrs", cluster)
		cfg := crdsync.Config{
			ID: id, ElectionTTL: ttl, Log: log, NodeCapacityDefault: maxEgressIPs, FollowCordon: followCordon, StartupTaint: startupTaint, CompactAfter: compactAfter,
			Defragment: defragment, ClusterCIDRs: ranges, BlockSize: blockSize, BlockHistory: blockHistory,
		}
		if serve {
			cfg.Webhook = &webhook
		} else if webhook.ClientCA != "" || len(webhook.Clients) > 0 {
			err = errors.Join(err, errors.New("--webhook-client-ca-file, --webhook-clients: there are clients of --webhook alone: want that too"))
		}
		if err = errors.Join(err, bad, cfg.Validate(), watched.Validate(), shown.Validate(), passed.validate(), etcd.secured()); err != nil {
			return err
		}
		klog.SetLogger(logr.FromSlogHandler(log.Handler()))
		slog.SetDefault(log)
		etcd.warn(log)
		kube, err := clientcmd.BuildConfigFromFlags(master, kubeconfig)
		if err != nil {
			return fmt.Errorf("reading the Kubernetes configuration (--kubeconfig %q): %w", kubeconfig, err)
		}
		cfg.Monitor, cfg.Metrics = watched.server(log, level)
		cfg.Monitor.Ready(crdsync.ReadyCheck, waitsForEtcd)
		return serving(c.Context(), cfg.Monitor, func() error {
			client, err := etcd.await(c.Context(), log)
			if err != nil {
				return err
			}
			defer client.Close()
			defer sayRights(c.Context(), client, store.CrdsyncGrants, store.OwnerPrefix, log)()
			log.Info("egret crdsync", "version", version, "id", id, "endpoints", etcd.endpoints, "api", kube.Host)
			cfg.Kube, cfg.Store = kube, client
			passed.endpoints, passed.log = etcd.endpoints, log
			return beside(c.Context(), passed.serve, func() error {
				return beside(c.Context(), func(ctx context.Context) { shown.serve(ctx, client, kube, log) }, func() error { return crdsync.Run(c.Context(), cfg) })
			})
		})
	})
	return c
}
