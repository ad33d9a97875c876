package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
)

// completeTimeout bounds what a shell waits for at a press of the tab key.
const completeTimeout = 2 * time.Second

// A namer returns the names that an argument or flag can have; args are those before it.
type namer func(ctx context.Context, c *admin.Client, args []string) ([]string, error)

// complete makes the shell offer names for the arguments of cmd, in order.
func complete(cmd *cobra.Command, names ...namer) *cobra.Command {
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) >= len(names) || names[len(args)] == nil {
			return nil, cobra.ShellCompDirectiveDefault // files
		}
		return offer(cmd, args, names[len(args)])
	}
	return cmd
}

// completeFlag makes the shell offer names for the value of a flag.
func completeFlag(cmd *cobra.Command, flag string, names namer) {
	err := cmd.RegisterFlagCompletionFunc(flag, func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		return offer(cmd, args, names)
	})
	if err != nil {
		panic(err) // a flag that the command does not have
	}
}

// words offers fixed words.
func words(list ...string) namer {
	return func(context.Context, *admin.Client, []string) ([]string, error) { return list, nil }
}

func offer(cmd *cobra.Command, args []string, names namer) ([]string, cobra.ShellCompDirective) {
	c, err := client(cmd)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), completeTimeout)
	defer cancel()
	list, err := names(ctx, c, args)
	if err != nil {
		cobra.CompDebugln(err.Error(), false)
	}
	return list, cobra.ShellCompDirectiveNoFileComp
}

// named makes a namer of a list of the API.
func named[T any](list func(*admin.Client, context.Context) ([]T, error), name func(T) string) namer {
	return func(ctx context.Context, c *admin.Client, _ []string) ([]string, error) {
		all, err := list(c, ctx)
		names := make([]string, 0, len(all))
		for _, v := range all {
			names = append(names, name(v))
		}
		return names, err
	}
}
