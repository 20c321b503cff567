package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

// quiet is the logger of commands that answer and end: what they have to say is their output and their error.
var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func getCommand() *cobra.Command {
	var etcd etcdFlags
	var output string
	var watch, events bool
	c := &cobra.Command{
		Use:       "get " + strings.Join(operator.Kinds, "|") + " [IP]",
		Short:     "Print what etcd holds",
		Long:      "Print what etcd holds, of blocks also those of one egress IP alone.",
		Args:      cobra.RangeArgs(1, 2),
		ValidArgs: operator.Kinds,
	}
	etcd.addOperator(c.Flags())
	c.Flags().StringVarP(&output, "output", "o", "", "json, yaml, name, wide, or jsonpath='{...}' (default: a table)")
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on, and print what comes, changes and goes, until Ctrl-C; the exit status is 0 then")
	c.Flags().BoolVar(&events, "output-watch-events", false, "with --watch: print of each record whether it was ADDED, MODIFIED or DELETED")
	c.RunE = configured(nil, func(c *cobra.Command, args []string) error {
		if err := operator.Check(args[0], output); err != nil {
			return err
		}
		if events && !watch {
			return errors.New("--output-watch-events: want --watch with it")
		}
		var of netip.Addr
		if len(args) == 2 {
			if args[0] != operator.KindBlocks {
				return fmt.Errorf("%s %s: only %s are listed of one IP; `egret describe` has all there is about one thing", args[0], args[1],
					operator.KindBlocks)
			}
			var err error
			if of, err = egressIP(args[1]); err != nil {
				return err
			}
		}
		log := quiet
		if watch {
			log = notes(c)
		}
		client, err := etcd.dial(c.Context(), log)
		if err != nil {
			return err
		}
		defer client.Close()
		if watch {
			cfg := operator.WatchConfig{Kind: args[0], IP: of, Format: output, Events: events, Log: log}
			return operator.Watch(c.Context(), client, cfg, c.OutOrStdout())
		}
		if args[0] == operator.KindBlocks {
			return operator.Blocks(c.Context(), client, of, output, c.OutOrStdout())
		}
		return operator.Get(c.Context(), client, args[0], output, c.OutOrStdout())
	})
	return c
}

func statusCommand() *cobra.Command {
	var etcd etcdFlags
	var output string
	var watch bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Print the whole system on one screen, and what is wrong with it",
		Long: "Print the whole system on one screen, and what is wrong with it. The exit status is 0 when all is well, 2 when traffic of some pods does\n" +
			"not flow, 3 when something else needs a person, and 1 when etcd could not be asked. It goes by what is in etcd.\n" +
			"With --watch it is drawn anew at a terminal as it changes, and elsewhere printed whenever something has changed, in json a document at a time;\n" +
			"the exit status is 0 when that is ended, by Ctrl-C.",
		Args: cobra.NoArgs,
	}
	etcd.addOperator(c.Flags())
	c.Flags().StringVarP(&output, "output", "o", "", "json or yaml (default: text)")
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on, and show what changes, until Ctrl-C")
	c.RunE = configured(nil, func(c *cobra.Command, _ []string) error {
		if err := operator.CheckReport(output); err != nil {
			return err
		}
		if watch {
			return watched(c, &etcd, output, func(client *store.Client, s operator.Screen) error {
				return operator.WatchStatus(c.Context(), client, output, s)
			})
		}
		client, err := etcd.dial(c.Context(), quiet)
		if err != nil {
			return err
		}
		defer client.Close()
		return operator.Status(c.Context(), client, output, c.OutOrStdout())
	})
	return c
}

func describeCommand() *cobra.Command {
	var etcd etcdFlags
	var watch bool
	c := &cobra.Command{
		Use:       "describe " + strings.Join(operator.Described, "|") + " NAME",
		Short:     "Print all that etcd has about one thing, and what is wrong with it",
		Args:      cobra.ExactArgs(2),
		ValidArgs: operator.Described,
	}
	etcd.addOperator(c.Flags())
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on, and show what changes, until Ctrl-C; the exit status is 0 then")
	c.RunE = configured(nil, func(c *cobra.Command, args []string) error {
		if err := operator.CheckDescribed(args[0], args[1]); err != nil {
			return err
		}
		if watch {
			return watched(c, &etcd, "", func(client *store.Client, s operator.Screen) error {
				return operator.WatchDescribe(c.Context(), client, args[0], args[1], s)
			})
		}
		client, err := etcd.dial(c.Context(), quiet)
		if err != nil {
			return err
		}
		defer client.Close()
		return operator.Describe(c.Context(), client, args[0], args[1], c.OutOrStdout())
	})
	return c
}

func traceCommand() *cobra.Command {
	var etcd etcdFlags
	var agents agentsFlags
	var output, to string
	var live liveFlags
	c := &cobra.Command{
		Use:   "trace NAMESPACE/POD",
		Short: "Print why a pod leaves with the address that it has outside, or why it does not",
		Long: "Print why a pod leaves with the address that it has outside, step by step, by the records in etcd and by what the agents say of their\n" +
			"kernels, and last a verdict. A step with !! stops it, one with ? may. The exit status is 0 when it gets through as far as is known, 2 when it does\n" +
			"not, 3 when something may be in its way, and 1 when that is not known. The agents of the pod's node and of the gateway are asked for their kernels:\n" +
			"on that node by root, elsewhere with --agents-port; else the command that asks them is printed, and the verdict says that it goes by etcd alone.\n" +
			"--port and --protocol say what the pod sends: ports of the egress IP are counted to that destination, what has no ports has other ways, and\n" +
			"some destinations take some of it alone. With --live the agents also follow a packet through their nftables rules, those of others too. With\n" +
			"--port, and of ICMP, the agent of the pod's node sends it in the pod's name: a SYN, a datagram without data or an echo request, whose answer comes\n" +
			"to the pod. Without, it is one of the pod's own, which has to send one to --to within 8 seconds.",
		Example: "  egret trace prod/web-1 --to 203.0.113.9 --live --port 443",
		Args:    cobra.ExactArgs(1),
	}
	etcd.addOperator(c.Flags())
	agents.add(c.Flags())
	c.Flags().StringVar(&to, "to", "", "the address that the pod connects to (default: any outside)")
	live.add(c.Flags())
	c.Flags().StringVarP(&output, "output", "o", "", "json or yaml (default: text)")
	c.RunE = configured(nil, func(c *cobra.Command, args []string) error {
		q := operator.Question{Pod: args[0], Namespace: etcd.cluster.namespace}
		if err := errors.Join(operator.CheckDescribed("pod", q.Pod), operator.CheckReport(output)); err != nil {
			return err
		}
		if to != "" {
			ip, err := netip.ParseAddr(to)
			if err != nil {
				return fmt.Errorf("--to %q: want an IPv4 or IPv6 address", to)
			}
			q.To = ip.Unmap()
		}
		if err := live.question(&q); err != nil {
			return err
		}
		if q.Live != nil && !q.Live.Sends() {
			fmt.Fprintf(c.ErrOrStderr(), "waiting for a packet of %s to %s, up to 8 seconds: have it send one\n", q.Pod, q.To)
		}
		ask, err := agents.ask()
		if err != nil {
			return err
		}
		client, err := etcd.dial(c.Context(), quiet)
		if err != nil {
			return err
		}
		defer client.Close()
		return operator.Trace(c.Context(), client, q, ask, agent.KernelPage, output, c.OutOrStdout())
	})
	return c
}

func moveCommand() *cobra.Command {
	etcd := etcdFlags{acts: true}
	var cfg operator.MoveConfig
	var q question
	c := &cobra.Command{
		Use:   "move IP --to NODE",
		Short: "Move an egress IP to another node, without losing a packet",
		Args:  cobra.ExactArgs(1),
	}
	etcd.addOperator(c.Flags())
	c.Flags().StringVar(&cfg.To, "to", "", "the node that shall hold the IP")
	c.Flags().BoolVar(&cfg.Pin, "pin", false, "prefer that node for the IP from then on")
	c.Flags().BoolVar(&cfg.Force, "force", false, "also beyond the node's capacity, and away from the node that the IP is pinned to")
	c.Flags().DurationVar(&cfg.Patience, "timeout", 15*time.Second, "how long to wait before the request is withdrawn; whole seconds, at least 2s")
	q.add(c.Flags())
	_ = c.MarkFlagRequired("to") // fails only for a flag that does not exist
	c.RunE = configured(nil, func(c *cobra.Command, args []string) error {
		var err error
		if cfg.IP, err = egressIP(args[0]); err != nil {
			return err
		}
		if cfg.Patience < 2*time.Second || cfg.Patience%time.Second != 0 {
			return fmt.Errorf("--timeout %v: want whole seconds, at least 2s", cfg.Patience)
		}
		client, err := etcd.dial(c.Context(), quiet)
		if err != nil {
			return err
		}
		defer client.Close()
		if cfg.Force {
			if err := q.ask(c, func() (string, error) { return operator.Forced(c.Context(), client, cfg) }); err != nil {
				return err
			}
		}
		return operator.Move(c.Context(), client, cfg, c.OutOrStdout())
	})
	return c
}

func egressIP(text string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(text)
	if err != nil {
		return ip, fmt.Errorf("%q: want an egress IP, an IPv4 or IPv6 address", text)
	}
	return ip.Unmap(), nil
}

// isIP refuses arguments other than one egress IP.
func isIP(c *cobra.Command, args []string) error {
	if err := cobra.ExactArgs(1)(c, args); err != nil {
		return err
	}
	_, err := egressIP(args[0])
	return err
}

// does makes a command as on does, which does something for a person.
func does(use, short string, run func(context.Context, *store.Client, string, io.Writer) error) *cobra.Command {
	return on(use, short, etcdFlags{acts: true}, run)
}

// on makes a command of one argument that works with a client of etcd.
func on(use, short string, etcd etcdFlags, run func(context.Context, *store.Client, string, io.Writer) error) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(1)}
	etcd.addOperator(c.Flags())
	c.RunE = configured(nil, func(c *cobra.Command, args []string) error {
		client, err := etcd.dial(c.Context(), quiet)
		if err != nil {
			return err
		}
		defer client.Close()
		return run(c.Context(), client, args[0], c.OutOrStdout())
	})
	return c
}

func unpinCommand() *cobra.Command {
	c := does("unpin IP", "Drop the pin of an egress IP; it stays where it is", func(ctx context.Context, c *store.Client, arg string, w io.Writer) error {
		ip, err := egressIP(arg)
		if err != nil {
			return err
		}
		return operator.Unpin(ctx, c, ip, w)
	})
	c.Args = isIP
	return c
}

func cordonCommand() *cobra.Command {
	var q question
	var c *cobra.Command
	c = does("cordon NODE", "Make a node take no egress IPs, and give away those that it holds",
		func(ctx context.Context, client *store.Client, node string, w io.Writer) error {
			if err := q.ask(c, func() (string, error) { return operator.Leaving(ctx, client, node) }); err != nil {
				return err
			}
			return operator.Cordon(ctx, client, node, w)
		})
	q.add(c.Flags())
	return c
}

func uncordonCommand() *cobra.Command {
	return does("uncordon NODE", "Let a node take egress IPs again", operator.Uncordon)
}

func drainCommand() *cobra.Command {
	var wait bool
	var patience time.Duration
	var q question
	var c *cobra.Command
	c = does("drain NODE", "Move all egress IPs away from a node, one at a time, without losing a packet, and let it take none",
		func(ctx context.Context, client *store.Client, node string, w io.Writer) error {
			if err := q.ask(c, func() (string, error) { return operator.Leaving(ctx, client, node) }); err != nil {
				return err
			}
			if !wait {
				return operator.Drain(ctx, client, node, 0, w)
			}
			return operator.Drain(ctx, client, node, patience, w)
		})
	q.add(c.Flags())
	c.Flags().BoolVar(&wait, "wait", false, "report each IP that leaves, and return when all have left")
	c.Flags().DurationVar(&patience, "timeout", 5*time.Minute, "how long to wait")
	c.PreRunE = func(*cobra.Command, []string) error {
		if patience <= 0 {
			return fmt.Errorf("--timeout %v: want more than 0s", patience)
		}
		return nil
	}
	return c
}

func historyCommand() *cobra.Command {
	var output string
	c := on("history IP", "Print who held an egress IP, since when, why, and who asked for it", etcdFlags{}, func(ctx context.Context, c *store.Client, arg string, w io.Writer) error {
		ip, err := egressIP(arg)
		if err != nil {
			return err
		}
		return operator.History(ctx, c, ip, output, w)
	})
	c.Flags().StringVarP(&output, "output", "o", "", "json or yaml (default: a table)")
	c.Args = isIP
	c.PreRunE = func(*cobra.Command, []string) error { return operator.CheckFormat(output) }
	return c
}
