package main

import (
	"github.com/spf13/cobra"

	"github.com/egret-project/egret/integration/demo"
	"github.com/egret-project/egret/integration/lab"
)

func demoCommand(name *string) *cobra.Command {
	var webhook bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the high-availability example in a lab of its own, check every step, and remove the lab",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := lab.Config{Name: *name, NoWebhook: !webhook}
			if !cmd.Flags().Changed("name") {
				cfg.Name = "demo" // beside a lab that somebody works with
			}
			return demo.Run(cmd.Context(), cfg, cmd.OutOrStdout())
		},
	}
	webhookFlag(cmd.Flags(), &webhook)
	return cmd
}
