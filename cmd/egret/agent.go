package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/gossip"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/store"
)

// agentFlags is the configuration of `egret agent`.
type agentFlags struct {
	etcd                                 etcdFlags
	config, node, nodeIP                 string
	uplink                               string
	leaseTTL, permit, claimDelay, linger time.Duration
	restartGrace                         time.Duration
	except, cluster                      []string
	randomPorts                          bool
	rebalance                            string
	holdDown, holdUnknown                time.Duration
	gossipPort                           int
	shareTables, fastPath                bool
	sysctl                               string
	gossipKeyFile, onStoreLoss           string
	monitor                              monitorFlags
	natLog                               agent.NATLog
	log                                  logFlags
}

func agentCommand() *cobra.Command {
	var f agentFlags
	c := &cobra.Command{
		Use:   "agent",
		Short: "Hold egress IPs and program this node's kernel",
		Long: "Runs on every node, in its network namespace, as root. It contends in etcd for the egress IPs that the node may hold, and\n" +
			"programs nftables, policy routing, the overlay and ARP. SIGTERM leaves the kernel as it is, for the next agent to adopt.",
		Args: cobra.NoArgs,
	}
	s := c.Flags()
	f.etcd.add(s)
	host, _ := os.Hostname() // without one, --node has to be given: Validate says so
	s.StringVar(&f.config, "config", "", "YAML file of these options, without the dashes; the command line wins")
	s.StringVar(&f.node, "node", host, "name of the Kubernetes node")
	s.StringVar(&f.nodeIP, "node-ip", "", "address of this node that the overlay uses (default: the first of its Kubernetes InternalIPs)")
	s.StringVar(&f.uplink, "uplink", "", "link that all egress IPs leave by (default: the one whose subnet holds the IP, else that of the node's address)")
	s.DurationVar(&f.leaseTTL, "lease-ttl", 10*time.Second, "how long etcd keeps the locks of an agent that it hears nothing of; whole seconds, at least 2s")
	s.DurationVar(&f.permit, "permit", 500*time.Millisecond, "how long the kernel goes on answering for an egress IP when the agent is stuck; on a node that takes over the longest one of all counts")
	s.DurationVar(&f.claimDelay, "claim-delay", time.Second, "how much longer each next candidate waits before it claims a free egress IP")
	s.DurationVar(&f.linger, "linger", 5*time.Second, "how long the former owner forwards what is under way after a planned move")
	s.DurationVar(&f.restartGrace, "restart-grace", 40*time.Second, "how long the kernel serves on without an agent that was told to stop; if the node goes down in that time, its IPs are out of service for the rest of it")
	s.StringSliceVar(&f.except, "egress.exceptCIDRs", nil, "destinations that are never SNATed, on top of node addresses, the nodes' pod CIDRs and the ServiceCIDRs")
	s.BoolVar(&f.randomPorts, "egress.snatFullyRandomPorts", false, "choose the source ports of SNATed connections at random, against port guessing; after a move of their IP, open connections have other ports")
	s.StringSliceVar(&f.cluster, "cluster-cidrs", nil, "pod and Service CIDRs of the cluster, on top of those that crdsync names; pods of these are held while they are new (--hold-unknown)")
	s.StringVar(&f.rebalance, "rebalance", "off", "auto: IPs go back to the node that they belong to, one at a time; off: they stay where they are; the same on all nodes")
	s.DurationVar(&f.holdDown, "rebalance-hold-down", 5*time.Minute, "for how long an IP has to belong elsewhere before --rebalance=auto moves it")
	s.DurationVar(&f.holdUnknown, "hold-unknown", 2*time.Second, "how long a new pod waits with its first connection out of the cluster, until it is known whether an egress selects it; 0: not at all")
	s.BoolVar(&f.shareTables, "share-tables", false, "let other programs change and flush Egret's nftables tables; without it, Linux 6.9 and later keep them off while the agent runs")
	s.BoolVar(&f.fastPath, "fast-path", false, "forward by eBPF programs what the nftables tables would forward for other nodes; the node's own firewall does not see it (Linux 6.6 or later, CAP_BPF and CAP_PERFMON; IPv4; docs/datapath.md)")
	addSysctlDir(s, &f.sysctl)
	s.IntVar(&f.gossipPort, "gossip-port", gossip.DefaultPort, "TCP and UDP port on which the agents find out within a second who is dead; 0: off")
	s.StringVar(&f.gossipKeyFile, "gossip-key-file", "", "file of the gossip's key, 16, 24 or 32 bytes in base64, the same on all nodes; it is read again when it is replaced, and may have others, a line each, that are understood, too; without it there is no gossip")
	s.StringVar(&f.onStoreLoss, "on-store-loss", "freeze", "freeze: keep the egress IPs while all agents have lost etcd (needs the gossip); release: let them go")
	s.StringVar(&f.natLog.File, "nat-log", "", "file for a line of JSON for each connection by an egress IP that begins and ends; - is the standard output (default: off; docs/natlog.md)")
	s.IntVar(&f.natLog.MaxSize, "nat-log-max-size", 100, "how large that file may become before it is renamed and another one begun, in MB")
	s.IntVar(&f.natLog.Files, "nat-log-max-files", 10, "how many renamed files of it are kept; 0: all")
	s.IntVar(&f.natLog.Days, "nat-log-max-days", 0, "for how many days they are kept; 0: whatever their age")
	s.StringSliceVar(&f.natLog.Filter, "nat-log-filter", nil, "log connections of these alone: egress=NAME, namespace=NAME, ip=ADDRESS, comma separated")
	s.IntVar(&f.natLog.Sample, "nat-log-sample", 1, "log one connection in so many")
	f.monitor.add(s, egress.StatusPort)
	s.StringSliceVar(&f.monitor.Readers, "who-clients", nil, "common names of client certificates that may ask at --metrics-address which pod has a port, and what the kernel has for a pod (default: none; root may on the node)")
	s.StringSliceVar(&f.monitor.Tracers, "trace-clients", nil,
		"common names of client certificates that may ask there what the kernel has for a pod, and nothing else, as crdsync does for its page (default: none)")
	f.log.add(s)
	c.RunE = configured(&f.config, func(c *cobra.Command, _ []string) error { return f.run(c) })
	return c
}

// validate returns the agent's Config, or every fault at once.
func (f *agentFlags) validate() (agent.Config, error) {
	var errs []error
	fault := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	cfg := agent.Config{
		Node: f.node, Version: version, Exposed: f.etcd.exposed(), NATLog: f.natLog,
		Timing: agent.Timing{
			LeaseTTL: f.leaseTTL, Permit: f.permit, ClaimDelay: f.claimDelay, Linger: f.linger, RestartGrace: f.restartGrace,
		},
		Network: agent.Network{
			Uplink: f.uplink, HoldUnknown: f.holdUnknown, RandomPorts: f.randomPorts, ShareTables: f.shareTables, FastPath: f.fastPath, Sysctl: f.sysctl,
		},
	}
	if f.node == "" {
		fault("--node: want the name of the Kubernetes node that this is")
	}
	if f.nodeIP != "" {
		ip, err := netip.ParseAddr(f.nodeIP)
		if err != nil {
			fault("--node-ip %q: want an IPv4 or IPv6 address", f.nodeIP)
		}
		cfg.NodeIP = ip.Unmap()
	}
	if f.leaseTTL < 2*time.Second || f.leaseTTL%time.Second != 0 {
		fault("--lease-ttl %v: want whole seconds, at least 2s", f.leaseTTL)
	}
	if f.permit < 100*time.Millisecond || f.permit > min(f.leaseTTL, ownership.MaxPermit) {
		fault("--permit %v: want 100ms up to --lease-ttl, and to %v", f.permit, ownership.MaxPermit)
	}
	if f.holdUnknown < 0 || f.holdUnknown%time.Millisecond != 0 {
		fault("--hold-unknown %v: want whole milliseconds, or 0", f.holdUnknown)
	}
	if f.claimDelay < 0 || f.linger < 0 || f.restartGrace < 0 {
		fault("--claim-delay %v, --linger %v, --restart-grace %v: want no negative duration", f.claimDelay, f.linger, f.restartGrace)
	}
	switch {
	case f.rebalance != "off" && f.rebalance != "auto":
		fault("--rebalance %q: want off or auto", f.rebalance)
	case f.holdDown <= 0:
		fault("--rebalance-hold-down %v: want more than 0s", f.holdDown)
	case f.rebalance == "auto":
		cfg.Rebalance = f.holdDown
	}
	if f.gossipPort < 0 || f.gossipPort > 65535 {
		fault("--gossip-port %d: want a port, or 0", f.gossipPort)
	}
	if f.gossipKeyFile != "" && f.gossipPort != 0 {
		keys, err := gossip.ReadKeys(f.gossipKeyFile)
		if err != nil {
			fault("--gossip-key-file: %w", err)
		}
		if err == nil {
			cfg.Gossip.Key = keys[0]
		}
		cfg.Gossip.Keys, cfg.Gossip.Port = func() ([][]byte, error) { return gossip.ReadKeys(f.gossipKeyFile) }, f.gossipPort
	}
	if cfg.Gossip.Freeze = f.onStoreLoss == "freeze"; !cfg.Gossip.Freeze && f.onStoreLoss != "release" {
		fault("--on-store-loss %q: want freeze or release", f.onStoreLoss)
	}
	var err error
	cfg.Except, err = prefixes("--egress.exceptCIDRs", f.except)
	errs = append(errs, err)
	cfg.Cluster, err = prefixes("--cluster-cidrs", f.cluster)
	errs = append(errs, err, f.monitor.Validate(), f.natLog.Validate(), f.etcd.secured())
	return cfg, errors.Join(errs...)
}

func (f *agentFlags) run(c *cobra.Command) error {
	cfg, err := f.validate()
	log, level, lerr := f.log.logger(os.Stderr)
	if err := errors.Join(err, lerr); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("the agent programs the kernel: run it as root")
	}
	cfg.Log = log
	log.Info("egret agent", "version", version, "node", cfg.Node, "endpoints", f.etcd.endpoints, "lease_ttl", cfg.LeaseTTL, "permit", cfg.Permit,
		"packet_mark_mask", egress.MarkMask, "conn_mark", egress.ConnTag, "overlay_port", egress.OverlayPort,
		"rule_priorities", fmt.Sprintf("%d-%d", egress.MinPriority, egress.MaxPriority), "tables_from", egress.FirstTable)
	f.etcd.warn(log)
	if cfg.Gossip.Key == nil {
		log.Warn("no gossip: a dead agent is found when its lease ends, and no IP outlives the loss of etcd by more than that; " +
			"it takes --gossip-port and --gossip-key-file")
	}
	cfg.Monitor, cfg.Metrics = f.monitor.server(log, level)
	cfg.Monitor.Ready(agent.ReadyCheck, waitsForEtcd)
	return serving(c.Context(), cfg.Monitor, func() error {
		var err error
		if cfg.Store, err = f.etcd.await(c.Context(), log); err != nil {
			return err
		}
		defer cfg.Store.Close()
		defer sayRights(c.Context(), cfg.Store, store.AgentGrants, store.IDPrefix, log)()
		return agent.Run(c.Context(), cfg)
	})
}
