// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"errors"
	"fmt"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"go.uber.org/zap"
)

// Source says where the cluster configuration is. The zero value uses the pod's service
// account, which is an error outside of a pod.
type Source struct {
	// Use the service account of the pod that Caddy runs in. Outside of a pod, a
	// config with this option is valid but answers every request with 503.
	//
	// Default: true where `kubeconfig` is not given and a service account is
	// present.
	InCluster bool `json:"in_cluster,omitempty"`

	// The path of a kubeconfig file. Placeholders such as `{env.HOME}` are
	// expanded when the config is loaded. Its user needs credentials (a token,
	// a token file, a client certificate or an exec plugin) that may
	// impersonate users and groups. It must not have `as` or the like itself.
	//
	// Default: none.
	Kubeconfig string `json:"kubeconfig,omitempty"`

	// The context of the kubeconfig file to use.
	//
	// Default: the file's current context.
	Context string `json:"context,omitempty"`
}

// Validate returns an error if the options contradict each other.
func (s Source) Validate() error {
	if s.InCluster && s.Kubeconfig != "" {
		return errors.New("in_cluster and kubeconfig exclude each other")
	}
	if s.Context != "" && s.Kubeconfig == "" {
		return fmt.Errorf("context %q: only a kubeconfig has contexts", s.Context)
	}
	return nil
}

// load reads the cluster configuration. A Caddy config for a pod is often validated
// outside of one, which is not an error: unusable then says why it cannot be used here.
func (s Source) load(logger *zap.Logger) (config clusterConfig, unusable, err error) {
	if s.Kubeconfig != "" {
		path, err := caddy.NewReplacer().ReplaceOrErr(s.Kubeconfig, true, true)
		if err != nil {
			return clusterConfig{}, nil, fmt.Errorf("kubeconfig %q: %w", s.Kubeconfig, err)
		}
		config, err = fromKubeconfig(path, s.Context)
		return config, nil, err
	}
	config, err = inCluster()
	if s.InCluster && errors.Is(err, errNotInPod) {
		logger.Error("every request will be refused", zap.Error(err))
		return clusterConfig{}, err, nil
	}
	return config, nil, err
}

// UnmarshalOption sets s from the option at d's cursor and its arguments. It reports
// whether a Source has such an option.
func (s *Source) UnmarshalOption(d *caddyfile.Dispenser) (known bool, err error) {
	option := d.Val()
	switch option {
	case "in_cluster":
		if s.InCluster {
			return true, d.Errf("%s is given twice", option)
		}
		if d.NextArg() {
			return true, d.Errf("unexpected argument %q after %s", d.Val(), option)
		}
		s.InCluster = true
	case "kubeconfig":
		if s.Kubeconfig != "" {
			return true, d.Errf("%s is given twice", option)
		}
		args := d.RemainingArgs()
		if len(args) == 0 || args[0] == "" {
			return true, d.Errf("%s has no path", option)
		}
		if len(args) > 2 {
			return true, d.Errf("unexpected argument %q after %s", args[2], option)
		}
		s.Kubeconfig = args[0]
		if len(args) == 2 {
			if args[1] == "" {
				return true, d.Errf("the context after %s is empty", option)
			}
			s.Context = args[1]
		}
	default:
		return false, nil
	}
	if d.NextBlock(d.Nesting()) {
		return true, d.Errf("%s takes no block", option)
	}
	return true, nil
}
