package main

import (
	"context"
	"strings"

	"github.com/egret-project/egret/integration/lab"
	"github.com/spf13/cobra"
)

// nodeCommands returns those that take a node and nothing else.
func nodeCommands(name *string) []*cobra.Command {
	var cmds []*cobra.Command
	for _, c := range []struct {
		verb, short string
		run         func(*lab.Lab, context.Context, string) error
	}{
		{"crash", "Power a node off: its agent is killed, its links go down", (*lab.Lab).Crash},
		{"recover", "Boot a node that was powered off, with its pods", (*lab.Lab).Recover},
		{"freeze", "Stop a node's agent, or a member of etcd, where it is (SIGSTOP)", (*lab.Lab).Freeze},
		{"thaw", "Let what is frozen go on (SIGCONT)", (*lab.Lab).Thaw},
	} {
		cmds = append(cmds, &cobra.Command{
			Use:   c.verb + " NODE",
			Short: c.short,
			Args:  cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				return inLab(name, func(ctx context.Context, l *lab.Lab) error { return c.run(l, ctx, args[0]) })(cmd, args)
			},
		})
	}
	return cmds
}

// cutCommands returns those that take a node and what to cut it off from.
func cutCommands(name *string) []*cobra.Command {
	var cmds []*cobra.Command
	for _, c := range []struct {
		verb, short string
		run         func(*lab.Lab, context.Context, string, string) error
	}{
		{"cut", "Cut a node off from etcd, from its peers, or from everything", (*lab.Lab).Cut},
		{"heal", "Undo cut", (*lab.Lab).Heal},
	} {
		cmds = append(cmds, &cobra.Command{
			Use:   c.verb + " NODE " + strings.Join(lab.Cuts, "|"),
			Short: c.short,
			Args:  cobra.ExactArgs(2),
			RunE: func(cmd *cobra.Command, args []string) error {
				return inLab(name, func(ctx context.Context, l *lab.Lab) error { return c.run(l, ctx, args[0], args[1]) })(cmd, args)
			},
		})
	}
	return cmds
}

// processCommands returns those that take a process and, for an agent, its node.
func processCommands(name *string) []*cobra.Command {
	var cmds []*cobra.Command
	for _, c := range []struct {
		verb, short string
		run         func(*lab.Lab, context.Context, string, string) error
	}{
		{"stop", "Stop a process (SIGTERM) and wait until it is gone; data is kept", (*lab.Lab).Stop},
		{"kill", "Kill a process (SIGKILL); start starts it again", (*lab.Lab).Kill},
		{"start", "Start a process that was stopped", (*lab.Lab).Start},
	} {
		cmds = append(cmds, &cobra.Command{
			Use:   c.verb + " etcd|etcd-N|apiserver|crdsync|agent [NODE]",
			Short: c.short,
			Args:  cobra.RangeArgs(1, 2),
			RunE: func(cmd *cobra.Command, args []string) error {
				args = append(args, "")
				return inLab(name, func(ctx context.Context, l *lab.Lab) error { return c.run(l, ctx, args[0], args[1]) })(cmd, args)
			},
		})
	}
	return cmds
}

// partitionCommands returns those that divide the LAN.
func partitionCommands(name *string) []*cobra.Command {
	return []*cobra.Command{{
		Use:     "partition SIDE SIDE...",
		Short:   "Divide nodes and members of etcd into sides that hear nothing of each other",
		Example: "  egret-lab partition node-1,etcd-1 node-2,node-3,etcd-2,etcd-3",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var sides [][]string
			for _, side := range args {
				sides = append(sides, strings.Split(side, ","))
			}
			return inLab(name, func(ctx context.Context, l *lab.Lab) error { return l.Partition(ctx, sides...) })(cmd, args)
		},
	}, {
		Use:   "rejoin",
		Short: "Undo partition",
		Args:  cobra.NoArgs,
		RunE:  inLab(name, func(ctx context.Context, l *lab.Lab) error { return l.Rejoin(ctx) }),
	}}
}
