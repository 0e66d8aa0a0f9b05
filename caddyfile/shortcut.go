// SPDX-License-Identifier: Apache-2.0

package caddyfile

import (
	"encoding/json"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/transport"
)

// streamCloseDelay is how long exec, attach and port-forward may go on after a
// config reload, unless the config says otherwise: about a working day.
const streamCloseDelay = 8 * time.Hour

func init() {
	httpcaddyfile.RegisterDirective("tailscale_kubernetes", parseShortcut)
	// It answers requests, as reverse_proxy does.
	httpcaddyfile.RegisterDirectiveOrder("tailscale_kubernetes", httpcaddyfile.After, "reverse_proxy")
}

// parseShortcut parses the tailscale_kubernetes directive. A site in front of an API
// server needs nothing else besides its listener. Syntax:
//
//	tailscale_kubernetes [<matcher>] {
//	    in_cluster
//	    kubeconfig         <path> [<context>]
//	    stream_close_delay <duration>
//	    <options of tailscale_impersonate>
//	}
//
// All options are optional, and so is the block. The first two are those of transport
// kubernetes. stream_close_delay is the option of reverse_proxy: how long exec, attach
// and port-forward go on after a config reload. Default: 8h. It expands to:
//
//	route [<matcher>] {
//	    tailscale_impersonate {
//	        <options>
//	    }
//	    reverse_proxy {
//	        dynamic kubernetes {
//	            in_cluster
//	            kubeconfig <path> [<context>]
//	        }
//	        transport kubernetes {
//	            in_cluster
//	            kubeconfig <path> [<context>]
//	        }
//	        flush_interval     -1
//	        stream_close_delay 8h
//	    }
//	}
func parseShortcut(helper httpcaddyfile.Helper) ([]httpcaddyfile.ConfigValue, error) {
	if !helper.Next() {
		return nil, helper.ArgErr()
	}
	matchers, err := helper.ExtractMatcherSet()
	if err != nil {
		return nil, err
	}
	d := helper.Dispenser
	d.Next() // the directive's name
	if d.NextArg() {
		return nil, d.Errf("unexpected argument %q: options go into a block", d.Val())
	}

	var config Config
	var source transport.Source
	var closeDelay caddy.Duration
	for d.NextBlock(0) {
		known, err := config.UnmarshalOption(d)
		if !known && err == nil {
			known, err = source.UnmarshalOption(d)
		}
		if err != nil {
			return nil, err
		}
		if known {
			continue
		}
		switch option := d.Val(); option {
		case "stream_close_delay":
			if closeDelay != 0 {
				return nil, d.Errf("%s is given twice", option)
			}
			args := d.RemainingArgs()
			if len(args) != 1 {
				return nil, d.Errf("%s takes one duration", option)
			}
			delay, err := caddy.ParseDuration(args[0])
			if err != nil || delay <= 0 {
				return nil, d.Errf("%s %q: must be a duration above zero, such as 8h", option, args[0])
			}
			closeDelay = caddy.Duration(delay)
		case "credentials":
			return nil, d.Err("credentials is not an option here: the caller's own credentials go without tailscale_impersonate; say reverse_proxy with transport kubernetes instead")
		default:
			return nil, d.Errf("unknown option %q", option)
		}
	}
	if err := config.Validate(); err != nil {
		return nil, d.WrapErr(err)
	}
	if err := source.Validate(); err != nil {
		return nil, d.WrapErr(err)
	}
	if closeDelay == 0 {
		closeDelay = caddy.Duration(streamCloseDelay)
	}

	proxy := reverseproxy.Handler{
		DynamicUpstreamsRaw: caddyconfig.JSONModuleObject(transport.Upstreams{Source: source}, "source", "kubernetes", nil),
		TransportRaw:        caddyconfig.JSONModuleObject(transport.Transport{Source: source}, "protocol", "kubernetes", nil),
		FlushInterval:       -1,
		StreamCloseDelay:    closeDelay,
	}
	route := caddyhttp.Route{HandlersRaw: []json.RawMessage{
		caddyconfig.JSONModuleObject(&config, "handler", "tailscale_impersonate", nil),
		caddyconfig.JSONModuleObject(proxy, "handler", "reverse_proxy", nil),
	}}
	if matchers != nil {
		route.MatcherSetsRaw = []caddy.ModuleMap{matchers}
	}
	return []httpcaddyfile.ConfigValue{{Class: "route", Value: route}}, nil
}
