// SPDX-License-Identifier: Apache-2.0

// Package cli adds the command tailscale-impersonate to Caddy, for users who set up the
// plugin.
package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/rbac"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "tailscale-impersonate",
		Usage: "<command>",
		Short: "Sets up access to Kubernetes over a tailnet",
		Long: `
Sets up access to a Kubernetes API server through the tailscale_impersonate handler,
and explains the handler's decisions.`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.AddCommand(kubeconfigCommand(), explainCommand(), rbacCommand())
		},
	})
}

func explainCommand() *cobra.Command {
	var peer, address string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "explain --peer <node or address> [--address <admin>] [--json]",
		Short: "Shows who a tailnet peer is to the cluster, and why",
		Long: `
Asks the admin API of a running Caddy who a tailnet peer is to the cluster, and prints
which grants give it each of its groups. Name the peer by its tailnet name, its address
or its node ID. It need not have sent a request.`,
		Example: "  caddy tailscale-impersonate explain --peer laptop",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			resp, err := caddycmd.AdminAPIRequest(address, http.MethodGet, "/tailscale_impersonate/peers/"+url.PathEscape(peer), nil, nil)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			var answer struct {
				Peers []*whoami.Facts `json:"peers"`
			}
			if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
				return fmt.Errorf("reading the admin API's answer: %w", err)
			}
			if asJSON {
				encoder := json.NewEncoder(cmd.OutOrStdout())
				encoder.SetIndent("", "  ")
				return encoder.Encode(answer)
			}
			return whoami.WriteText(cmd.OutOrStdout(), answer.Peers...)
		},
	}
	cmd.Flags().StringVar(&peer, "peer", "", "the peer's tailnet name, address or node ID")
	cmd.Flags().StringVar(&address, "address", caddy.DefaultAdminListen, "the address of Caddy's admin API")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	mustRequire(cmd, "peer")
	return cmd
}

func rbacCommand() *cobra.Command {
	var policy string
	options := rbac.Defaults()
	cmd := &cobra.Command{
		Use:   "rbac --policy <file> [--constrained] [--audit]",
		Short: "Writes the minimal RBAC for the proxy from a tailnet policy file",
		Long: `
Writes a ClusterRole and its binding. They allow the proxy's service account to
impersonate the groups that a tailnet policy file names in grants and as tags, and no
others. Run it again when the policy file changes. Grants with unknown or repeated keys
are reported on standard error.`,
		Example: "  caddy tailscale-impersonate rbac --policy policy.hujson | kubectl apply -f -",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := os.ReadFile(policy)
			if err != nil {
				return err
			}
			manifest, err := rbac.FromPolicy(text, options)
			if err != nil {
				return fmt.Errorf("%s: %w", policy, err)
			}
			problems, err := rbac.Problems(text, options)
			if err != nil {
				return fmt.Errorf("%s: %w", policy, err)
			}
			for _, problem := range problems {
				fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s: %s\n", policy, problem)
			}
			_, err = cmd.OutOrStdout().Write(manifest)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&policy, "policy", "", "the tailnet policy file")
	f.BoolVar(&options.Constrained, "constrained", false, "for API servers with constrained impersonation (Kubernetes 1.36 and later)")
	f.BoolVar(&options.Audit, "audit", false, "for a handler with the option audit")
	f.StringVar(&options.Capability, "capability", "", "the value of the handler's option capability, if set")
	f.StringVar(&options.GroupPrefix, "group-prefix", "", "the value of the handler's option group_prefix, if set")
	f.StringVar(&options.Name, "name", options.Name, "the name of the ClusterRole and of its binding")
	f.StringVar(&options.Namespace, "namespace", options.Namespace, "the namespace of the proxy's service account")
	f.StringVar(&options.ServiceAccount, "service-account", options.ServiceAccount, "the name of the proxy's service account")
	mustRequire(cmd, "policy")
	return cmd
}

// mustRequire marks flag as required.
func mustRequire(cmd *cobra.Command, flag string) {
	if err := cmd.MarkFlagRequired(flag); err != nil {
		panic(errors.Join(errors.New("[unexpected]"), err))
	}
}
