// Command egret is the agent, crdsync, and the operator's commands, in one binary. Called as kubectl-egret it is a
// kubectl plugin.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/operator"
)

// version is set by the linker; see the Makefile.
var version = "dev"

func main() {
	if len(os.Args) > 1 && os.Args[1] == "agent" {
		if err := withTimerSlack(); err != nil {
			fmt.Fprintln(os.Stderr, "egret: at rest the agent takes more CPU than it has to:", err)
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	c := root()
	c.SetArgs(arguments(os.Args))
	err := c.ExecuteContext(ctx)
	stop()
	if err != nil {
		complain(os.Stderr, err)
		os.Exit(exitStatus(err))
	}
}

// complain says what is wrong, unless the output has said it.
func complain(w io.Writer, err error) {
	if v := (operator.Verdict{}); !errors.As(err, &v) || !v.Said {
		fmt.Fprintln(w, "egret:", operator.PrintableLines(err.Error())) // parts of it may be others' words, which command no terminal
	}
}

// exitStatus returns what the process ends with: 1, unless the error says otherwise.
func exitStatus(err error) int {
	var v operator.Verdict
	if errors.As(err, &v) {
		return v.Status
	}
	return 1
}

// isPlugin reports whether kubectl has called the process.
func isPlugin() bool {
	as := filepath.Base(os.Args[0])
	return as == "kubectl-egret" || as == kubectlCompletes
}

func root() *cobra.Command {
	name := "egret"
	if isPlugin() {
		name = "kubectl egret"
	}
	c := &cobra.Command{
		Use:           "egret",
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: name},
		Short:         "Fixed, highly available source IPs for Kubernetes pods",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	c.AddCommand(agentCommand(), checkCommand(), cleanupCommand(), credentialsCommand(), cloudCommand(), crdsyncCommand(), rbacCommand(), logLevelCommand(), getCommand(), historyCommand(),
		moveCommand(), unpinCommand(), cordonCommand(), uncordonCommand(), drainCommand(), statusCommand(), describeCommand(), traceCommand(), pageCommand(), whoCommand(), bundleCommand())
	completions(c)
	c.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return fmt.Errorf("%w: `%s --help` lists the options", err, c.CommandPath())
	})
	remedies(c)
	return c
}

// remedies has errors about arguments say which ones a command wants.
func remedies(of *cobra.Command) {
	for _, c := range of.Commands() {
		remedies(c)
		if check := c.Args; check != nil {
			c.Args = func(c *cobra.Command, args []string) error {
				if err := check(c, args); err != nil {
					return fmt.Errorf("%w: want `%s`", err, c.UseLine())
				}
				return nil
			}
		}
	}
}
