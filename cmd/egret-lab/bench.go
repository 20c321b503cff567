package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/integration/connections"
	"github.com/egret-project/egret/integration/datapath"
	"github.com/egret-project/egret/integration/failover"
	"github.com/egret-project/egret/integration/scale"
)

func benchCommand(name *string) *cobra.Command {
	cmd := &cobra.Command{Use: "bench", Short: "Measure, in a lab of its own"}
	cmd.AddCommand(failoverCommand(name), deathsCommand(name), datapathCommand(name), connectionsCommand(name), scaleCommand(name))
	return cmd
}

// ownLab returns the name of the lab that a measurement makes: beside one that somebody works with.
func ownLab(cmd *cobra.Command, name string) string {
	if cmd.Flags().Changed("name") {
		return name
	}
	return "bench"
}

// writeFiles writes what was measured as file.csv and file.svg into a folder, which is made.
func writeFiles(folder, file string, csv, svg func(io.Writer) error) error {
	return errors.Join(writeFile(folder, file+".csv", csv), writeFile(folder, file+".svg", svg))
}

// writeFile writes one file into a folder, which is made.
func writeFile(folder, file string, write func(io.Writer) error) error {
	var text strings.Builder
	if err := write(&text); err != nil {
		return err
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(folder, file), []byte(text.String()), 0o644)
}

func datapathCommand(name *string) *cobra.Command {
	var cfg datapath.Config
	var out, agentFlags string
	cmd := &cobra.Command{
		Use:   "datapath",
		Short: "Measure what a packet's way through Egret costs, beside masquerading and a plain VXLAN; print medians and ratios, write CSV and SVG",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Lab.Name = ownLab(cmd, *name)
			cfg.Lab.AgentFlags = strings.Fields(agentFlags)
			results, err := datapath.Run(cmd.Context(), cfg, func(r datapath.Result) {
				fmt.Fprintf(cmd.ErrOrStderr(), "round %d, %s: %.0f\n", r.Round, r.Path, r.Values)
			})
			if len(results) == 0 {
				return err
			}
			return errors.Join(err, datapath.WriteTable(cmd.OutOrStdout(), results), writeFiles(out, "datapath",
				func(w io.Writer) error { return datapath.WriteCSV(w, results) }, func(w io.Writer) error { return datapath.WriteSVG(w, results) }))
		},
	}
	f := cmd.Flags()
	f.IntVar(&cfg.Rounds, "rounds", 7, "how often every path is measured, in turns")
	f.DurationVar(&cfg.Duration, "duration", 2*time.Second, "time for each of a path's four measurements in a round")
	f.StringVar(&agentFlags, "agent-flags", "", `further flags of every agent, in one word, as "--a=1 --b=2"`)
	f.StringVar(&out, "out", ".", "folder for datapath.csv and datapath.svg")
	return cmd
}

func failoverCommand(name *string) *cobra.Command {
	var cfg failover.Config
	var gossip bool
	var out, agentFlags string
	cmd := &cobra.Command{
		Use:   "failover",
		Short: "Let the owner of an egress IP fail, many times; print how long its pod was without it, write CSV and SVG",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Lab.Name = ownLab(cmd, *name)
			cfg.Lab.AgentFlags = strings.Fields(agentFlags)
			file := fmt.Sprintf("failover-%s-%d", cfg.Fault, cfg.Lab.Nodes)
			if !gossip {
				cfg.Lab.AgentFlags = append(cfg.Lab.AgentFlags, "--gossip-key-file=")
				file += "-lease"
			}
			lost := 0
			results, err := failover.Run(cmd.Context(), cfg, func(run int, r failover.Result) {
				fmt.Fprintf(cmd.ErrOrStderr(), "run %d: %v, %d lost\n", run, r.Gap.Round(time.Millisecond), r.Lost)
				lost += r.Lost
			})
			if len(results) == 0 {
				return err
			}
			if err := writeFiles(out, file, func(w io.Writer) error { return failover.WriteCSV(w, cfg, results) },
				func(w io.Writer) error { return failover.WriteSVG(w, cfg, results) }); err != nil {
				return err
			}
			q := func(q float64) time.Duration { return failover.Quantile(results, q).Round(100 * time.Microsecond) }
			_, err2 := fmt.Fprintf(cmd.OutOrStdout(), "%s, %d nodes, %d runs: p50 %v, p90 %v, p99 %v, max %v, %d lost in all\n",
				cfg.Fault, cfg.Lab.Nodes, len(results), q(0.5), q(0.9), q(0.99), q(1), lost)
			if planned := cfg.Fault == "move" || cfg.Fault == "drain"; planned && lost > 0 {
				err = errors.Join(err, fmt.Errorf("%d datagrams lost: a %s loses none", lost, cfg.Fault))
			}
			return cmp.Or(err, err2)
		},
	}
	f := cmd.Flags()
	f.IntVar(&cfg.Runs, "runs", 50, "how many times")
	f.IntVar(&cfg.Lab.Nodes, "nodes", 3, "number of nodes")
	f.StringVar(&cfg.Fault, "fault", failover.Faults[0], "what happens: "+strings.Join(failover.Faults, ", "))
	f.BoolVar(&gossip, "gossip", true, "let the agents gossip; without it a dead owner is found when its lease ends")
	f.StringVar(&agentFlags, "agent-flags", "", `further flags of every agent, in one word, as "--a=1 --b=2"`)
	f.StringVar(&out, "out", ".", "folder for failover-FAULT-NODES.csv and .svg, with -lease after it for --gossip=false")
	return cmd
}

func deathsCommand(name *string) *cobra.Command {
	var cfg failover.DeathsConfig
	var out string
	cmd := &cobra.Command{
		Use:   "deaths",
		Short: "Let nothing happen to nodes that hold egress IPs; print how often one was taken for dead, write CSV",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Lab.Name = ownLab(cmd, *name)
			d, err := failover.RunDeaths(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), d)
			return errors.Join(err, writeFile(out, fmt.Sprintf("deaths-%d.csv", d.Nodes), d.WriteCSV))
		},
	}
	f := cmd.Flags()
	f.DurationVar(&cfg.For, "for", time.Hour, "for how long")
	f.IntVar(&cfg.Lab.Nodes, "nodes", 10, "number of nodes, each with an egress IP")
	f.StringVar(&out, "out", ".", "folder for deaths-NODES.csv")
	return cmd
}

func connectionsCommand(name *string) *cobra.Command {
	var cfg connections.Config
	var require float64
	var out, agentFlags string
	cmd := &cobra.Command{
		Use:   "connections",
		Short: "Let something happen to the gateway of many connections; print which of them live, write CSV and SVG",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if require < 0 || require > 100 {
				return fmt.Errorf("--require-alive %g: want 0 to 100", require)
			}
			cfg.Lab.Name = ownLab(cmd, *name)
			cfg.Lab.AgentFlags = strings.Fields(agentFlags)
			cfg.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{ReplaceAttr: withoutTime}))
			file := "connections-" + cfg.Fault
			if cfg.Family != 4 {
				file += fmt.Sprintf("-ipv%d", cfg.Family)
			}
			report, err := connections.Run(cmd.Context(), cfg)
			if report == nil {
				return err
			}
			return errors.Join(err, report.WriteTable(cmd.OutOrStdout()), writeFiles(out, file, report.WriteCSV, report.WriteSVG),
				report.Require(require))
		},
	}
	f := cmd.Flags()
	f.IntVar(&cfg.Connections, "connections", 10000, "how many, of all kinds and pods together")
	f.IntVar(&cfg.Pods, "pods", 4, "number of pods, half of them on each of two nodes")
	f.IntVar(&cfg.Family, "family", 4, "4 or 6: the IP family")
	f.BoolVar(&cfg.OwnPorts, "own-ports", false, "give the pods source ports of their own, rather than the same ones to all")
	f.IntVar(&cfg.Lab.Nodes, "nodes", 4, "number of nodes")
	f.StringVar(&cfg.Fault, "fault", connections.Faults[0], "what happens: "+strings.Join(connections.Faults, ", "))
	f.DurationVar(&cfg.Interval, "interval", time.Second, "time between two messages of a connection")
	f.DurationVar(&cfg.Wait, "wait", 15*time.Second, "time from the end of the fault until it is asked which connections live")
	f.Float64Var(&require, "require-alive", 0, "fail when fewer connections of a kind live, in percent")
	f.StringVar(&agentFlags, "agent-flags", "", `further flags of every agent, in one word, as "--a=1 --b=2"`)
	f.StringVar(&out, "out", ".", "folder for connections-FAULT.csv and .svg, with -ipv6 after it for --family 6")
	return cmd
}

func scaleCommand(name *string) *cobra.Command {
	var cfg scale.Config
	var out string
	var beside int
	cmd := &cobra.Command{
		Use:   "scale",
		Short: "Measure etcd, crdsync and an agent in a cluster of thousands of nodes, beside one of few; print a table with the ratios, write CSV",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Lab.Name = ownLab(cmd, *name)
			cfg.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{ReplaceAttr: withoutTime}))
			sizes := []scale.Config{cfg}
			if beside > 0 && beside < cfg.Cluster.Nodes {
				sizes = []scale.Config{cfg.Of(beside), cfg}
			}
			var results []scale.Result
			var failed error
			for _, size := range sizes {
				r, err := scale.Run(cmd.Context(), size)
				results = append(results, r)
				if failed = err; failed != nil {
					break
				}
			}
			return errors.Join(failed, scale.WriteTable(cmd.OutOrStdout(), results...),
				writeFile(out, "scale.csv", func(w io.Writer) error { return scale.WriteCSV(w, results...) }))
		},
	}
	f := cmd.Flags()
	f.IntVar(&cfg.Cluster.Nodes, "nodes", 5000, "number of nodes, node-1 with a real agent, the others simulated")
	f.IntVar(&cfg.Cluster.Gateways, "gateways", 50, "how many of them pools select")
	f.IntVar(&cfg.Cluster.Egresses, "egresses", 5000, "number of egresses, each with an IPv4 and an IPv6 address")
	f.IntVar(&cfg.Cluster.Pods, "pods", 100000, "number of pods")
	f.IntVar(&cfg.Cluster.TakeOver, "take-over", 200, "how many IPs the gateway holds that is powered off")
	f.IntVar(&beside, "beside", 50, "number of nodes of the smaller cluster that is measured first; 0: none")
	f.DurationVar(&cfg.Rest, "rest", 30*time.Second, "for how long it is measured at rest, and again with pod events")
	f.IntVar(&cfg.Events, "events", 20, "pod events a second")
	f.DurationVar(&cfg.Rollout, "rollout", time.Minute, "for how long agents are restarted, if not all are before; 0: not at all")
	f.IntVar(&cfg.AtOnce, "at-once", 4, "how many agents are restarted at a time")
	f.StringVar(&out, "out", ".", "folder for scale.csv")
	return cmd
}
