package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/integration/scale"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func main() {
	if status, ok := lab.Helper(os.Args); ok {
		os.Exit(status)
	}
	if status, ok := scale.Helper(os.Args); ok {
		os.Exit(status)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := newRoot().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "egret-lab:", err)
		os.Exit(1)
	}
}

// newRoot returns the command with all its subcommands.
func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "egret-lab",
		Short:         "A whole cluster on one machine: real etcd and Kubernetes API, nodes and pods as network namespaces",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	name := root.PersistentFlags().String("name", lab.DefaultName, "which of several labs on this machine")
	root.AddCommand(
		upCommand(name), downCommand(name), statusCommand(name),
		podCommand(name), rmpodCommand(name), execCommand(name), sourceCommand(name), probeCommand(name), throughputCommand(name), kubectlCommand(name),
	)
	root.AddCommand(demoCommand(name), benchCommand(name))
	root.AddCommand(nodeCommands(name)...)
	root.AddCommand(cutCommands(name)...)
	root.AddCommand(processCommands(name)...)
	root.AddCommand(partitionCommands(name)...)
	return root
}

func upCommand(name *string) *cobra.Command {
	var cfg lab.Config
	var agentFlags string
	var webhook bool
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Build the lab, in the background; print its kubeconfig and etcd endpoint as shell variables",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Name, cfg.AgentFlags, cfg.NoWebhook = *name, strings.Fields(agentFlags), !webhook
			cfg.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{ReplaceAttr: withoutTime}))
			l, err := lab.Up(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "export KUBECONFIG=%s\nexport ETCDCTL_ENDPOINTS=%s\n", l.Kubeconfig(), strings.Join(l.EtcdEndpoints(), ","))
			return nil
		},
	}
	f := cmd.Flags()
	f.IntVar(&cfg.Nodes, "nodes", lab.DefaultNodes, "number of nodes")
	f.DurationVar(&cfg.LeaseTTL, "lease-ttl", lab.DefaultLeaseTTL, "time to live of the agents' leases")
	f.StringVar(&agentFlags, "agent-flags", "", `further flags of every agent, in one word, as "--a=1 --b=2"`)
	f.IntVar(&cfg.EtcdMembers, "etcd", lab.DefaultMembers, "number of members of Egret's etcd")
	f.BoolVar(&cfg.IPv6Nodes, "ipv6-nodes", false, "give the nodes IPv6 InternalIPs only, so that the overlay goes over IPv6")
	webhookFlag(f, &webhook)
	f.BoolVar(&cfg.Bare, "bare", false, "leave crdsync and the agents out: the cluster without Egret")
	f.BoolVar(&cfg.Kubelet, "kubelet", false, "a cluster that runs pods, with controllers and kubelets, and without Egret")
	f.StringVar(&cfg.CNI, "cni", "", "with --kubelet: "+strings.Join(lab.CNIs(), ", ")+" (default "+lab.CNIBridge+")")
	f.StringArrayVar(&cfg.Images, "image", nil, "with --kubelet: archive of an image that the nodes have (repeatable)")
	f.StringVar(&cfg.Egret, "egret", "", "the program egret (default: beside this one)")
	f.StringVar(&cfg.KubeBin, "kube-bin", "", "folder of kube-apiserver (default: k8s-"+lab.KubeVersion+" beside this program)")
	return cmd
}

// webhookFlag is of the commands whose labs people apply objects to.
func webhookFlag(f *pflag.FlagSet, webhook *bool) {
	f.BoolVar(webhook, "webhook", true, "have the webhook refuse faulty objects, as an installation has")
}

// withoutTime shortens log lines for people: a lab is up within seconds.
func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
		return slog.Attr{}
	}
	return a
}

func downCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Remove the lab, whatever its state; nothing is wrong when there is none",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return lab.Down(cmd.Context(), *name) },
	}
}

func statusCommand(name *string) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the lab's processes, nodes and pods",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			st, err := lab.ReadStatus(cmd.Context(), *name)
			if err != nil {
				return err
			}
			return printResult(cmd.OutOrStdout(), output, st)
		},
	}
	outputFlag(cmd, &output)
	return cmd
}

func outputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVarP(output, "output", "o", "text", "text or json")
}

func checkOutput(output string) error {
	if output != "text" && output != "json" {
		return fmt.Errorf("output %q: want text or json", output)
	}
	return nil
}

func printResult(w io.Writer, output string, v fmt.Stringer) error {
	if output == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	_, err := fmt.Fprint(w, v)
	return err
}

// inLab opens the lab and runs f.
func inLab(name *string, f func(context.Context, *lab.Lab) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		l, err := lab.Open(*name)
		if errors.Is(err, lab.ErrNoLab) {
			return fmt.Errorf("%w: build it with: egret-lab --name %s up", err, *name)
		} else if err != nil {
			return err
		}
		return f(cmd.Context(), l)
	}
}

func podCommand(name *string) *cobra.Command {
	var cfg lab.PodConfig
	cmd := &cobra.Command{
		Use:   "pod NAMESPACE/NAME --node NODE",
		Short: "Make a pod, and its namespace when there is none; print its addresses",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg.Name = args[0]
			return inLab(name, func(ctx context.Context, l *lab.Lab) error {
				p, err := l.Pod(ctx, cfg)
				if err != nil {
					return err
				}
				for _, ip := range p.IPs {
					fmt.Fprintln(cmd.OutOrStdout(), ip)
				}
				return nil
			})(cmd, args)
		},
	}
	cmd.Flags().StringVar(&cfg.Node, "node", "", "the node that it runs on, as node-1")
	cmd.Flags().StringToStringVar(&cfg.Labels, "labels", nil, "its labels, as app=web,tier=front")
	if err := cmd.MarkFlagRequired("node"); err != nil {
		panic(err) // the flag of the line above
	}
	return cmd
}

func rmpodCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use:   "rmpod NAMESPACE/NAME",
		Short: "Delete a pod at once",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return inLab(name, func(ctx context.Context, l *lab.Lab) error { return l.RemovePod(ctx, args[0]) })(cmd, args)
		},
	}
}

func execCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use:   "exec pod|node|outside NAME -- COMMAND...",
		Short: "Run a command in a network namespace of the lab; outside has no NAME, and so have control and lan",
		RunE: func(cmd *cobra.Command, args []string) error {
			dash := cmd.ArgsLenAtDash()
			if dash < 1 || dash > 2 || dash == len(args) {
				return errors.New("want: exec pod|node|outside NAME -- COMMAND")
			}
			target := append(args[:dash:dash], "")
			return inLab(name, func(_ context.Context, l *lab.Lab) error { return l.ExecReplace(target[0], target[1], args[dash:]...) })(cmd, args)
		},
	}
}

// familyFlag adds --family, and returns what gives the address of the outside host in that family.
func familyFlag(cmd *cobra.Command) func() (netip.Addr, error) {
	family := cmd.Flags().Int("family", 4, "4 or 6: the IP family")
	return func() (netip.Addr, error) {
		switch *family {
		case 4:
			return lab.OutsideIP, nil
		case 6:
			return lab.OutsideIP6, nil
		}
		return netip.Addr{}, fmt.Errorf("family %d: want 4 or 6", *family)
	}
}

func sourceCommand(name *string) *cobra.Command {
	var outside func() (netip.Addr, error)
	cmd := &cobra.Command{
		Use:   "source NAMESPACE/NAME",
		Short: "Open a TCP connection from a pod to the outside host; print the source address seen there",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return inLab(name, func(ctx context.Context, l *lab.Lab) error {
				to, err := outside()
				if err != nil {
					return err
				}
				ip, err := l.SourceTo(ctx, args[0], to)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), ip)
				return err
			})(cmd, args)
		},
	}
	outside = familyFlag(cmd)
	return cmd
}

func probeCommand(name *string) *cobra.Command {
	var interval, duration time.Duration
	var output string
	var outside func() (netip.Addr, error)
	cmd := &cobra.Command{
		Use:   "probe NAMESPACE/NAME",
		Short: "Send UDP datagrams from a pod to the outside host's echo server; print sent, lost, longest gap, sources seen",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			return inLab(name, func(ctx context.Context, l *lab.Lab) error {
				to, err := outside()
				if err != nil {
					return err
				}
				r, err := l.ProbeTo(ctx, args[0], to, interval, duration)
				if err != nil {
					return err
				}
				return printResult(cmd.OutOrStdout(), output, r)
			})(cmd, args)
		},
	}
	cmd.Flags().DurationVar(&interval, "interval", time.Millisecond, "time between two datagrams")
	cmd.Flags().DurationVar(&duration, "duration", 10*time.Second, "time to send for; an interrupt ends it earlier")
	outside = familyFlag(cmd)
	outputFlag(cmd, &output)
	return cmd
}

func throughputCommand(name *string) *cobra.Command {
	var duration time.Duration
	var outside func() (netip.Addr, error)
	cmd := &cobra.Command{
		Use:   "throughput NAMESPACE/NAME",
		Short: "Send over one TCP connection from a pod to the outside host; print how many Mbit/s arrived",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return inLab(name, func(ctx context.Context, l *lab.Lab) error {
				to, err := outside()
				if err != nil {
					return err
				}
				bits, err := l.Throughput(ctx, args[0], to, duration)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%.1f\n", bits/1e6)
				return err
			})(cmd, args)
		},
	}
	cmd.Flags().DurationVar(&duration, "duration", 10*time.Second, "time to send for")
	outside = familyFlag(cmd)
	return cmd
}

func kubectlCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use:   "kubectl -- ARGS...",
		Short: "Run kubectl as the lab's cluster admin",
		RunE: func(cmd *cobra.Command, args []string) error {
			return inLab(name, func(_ context.Context, l *lab.Lab) error { return l.KubectlReplace(args...) })(cmd, args)
		},
	}
}
