package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/agent"
)

func cleanupCommand() *cobra.Command {
	var q question
	c := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove from this node all that the agent has made in its kernel",
		Long: "Runs on a node, in its network namespace, as root, when the agent is stopped for good: tables, rules, routes, links and\n" +
			"connections of Egret go, what others made stays. It can be run again. An agent that is started later makes everything anew.",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("the cleanup programs the kernel: run it as root")
			}
			if err := q.ask(c, func() (string, error) { return cleanupSays, nil }); err != nil {
				return err
			}
			if err := agent.Cleanup(quiet); err != nil {
				return err
			}
			fmt.Fprintln(c.OutOrStdout(), "nothing of egret is left in the kernel of this node")
			return nil
		},
	}
	q.add(c.Flags())
	return c
}

const cleanupSays = "All that Egret has in the kernel of this node goes: tables, rules, routes, links and connections. Pods that an egress selects leave with the\n" +
	"address that the CNI gives to them, until an agent runs here again."
