package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
)

func cleanupCommand() *cobra.Command {
	var q question
	var stay bool
	var sysctl string
	c := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove from this node all that the agent has made in its kernel",
		Long: "Runs on a node, in its network namespace, as root, when the agent is stopped for good: tables, rules, routes, links and\n" +
			"connections of Egret go, what others made stays. It can be run again. An agent that is started later makes everything anew.\n" +
			"With --stay the agents' DaemonSet runs it in place of the agents (docs/install.md, Uninstall): its rollout waits for each node's.",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("the cleanup programs the kernel: run it as root")
			}
			if err := q.ask(c, func() (string, error) { return cleanupSays, nil }); err != nil {
				return err
			}
			if err := agent.Cleanup(sysctl, quiet); err != nil {
				return err
			}
			fmt.Fprintln(c.OutOrStdout(), "nothing of egret is left in the kernel of this node")
			if !stay {
				return nil
			}
			return monitor.New(monitor.Config{Local: agentStatus, Log: quiet}).Run(c.Context())
		},
	}
	q.add(c.Flags())
	c.Flags().BoolVar(&stay, "stay", false, "stay when that is done, ready at "+agentStatus+" as an agent is, until it is stopped")
	addSysctlDir(c.Flags(), &sysctl)
	return c
}

// addSysctlDir adds the flag of whatever changes settings of links.
func addSysctlDir(s *pflag.FlagSet, dir *string) {
	s.StringVar(dir, "sysctl-dir", "/proc/sys/net", "where the settings of /proc/sys/net can be written: in a container that is not privileged, a mount of the node's")
}

// agentStatus is where the probes of the agents' DaemonSet ask.
var agentStatus = fmt.Sprintf("127.0.0.1:%d", egress.StatusPort)

const cleanupSays = "All that Egret has in the kernel of this node goes: tables, rules, routes, links and connections. Pods that an egress selects leave with the\n" +
	"address that the CNI gives to them, until an agent runs here again."
