// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"sync"

	"tailscale.com/client/local"
	"tailscale.com/ipn"
	"tailscale.com/tailcfg"
)

// settings makes the ports of one service change the settings of its node one after another.
// The node has one list of services that it offers.
var settings sync.Mutex

// attempts is how often a serve config is written that somebody else writes as well.
const attempts = 5

// serve makes the node take the packets to port of service, and leave the connections to
// tsnet. It is a [problem] if another program has the node handle them.
func serve(ctx context.Context, client *local.Client, service tailcfg.ServiceName, port uint16) error {
	return change(ctx, client, func(config *ipn.ServeConfig) (changed bool, err error) {
		s := config.Services[service]
		if s != nil && s.Tun {
			return false, taken(service, port)
		}
		if s != nil && s.TCP[port] != nil {
			if !reflect.ValueOf(*s.TCP[port]).IsZero() {
				return false, taken(service, port)
			}
			return false, nil
		}
		if s == nil {
			s = new(ipn.ServiceConfig)
			if config.Services == nil {
				config.Services = make(map[tailcfg.ServiceName]*ipn.ServiceConfig)
			}
			config.Services[service] = s
		}
		if s.TCP == nil {
			s.TCP = make(map[uint16]*ipn.TCPPortHandler)
		}
		s.TCP[port] = new(ipn.TCPPortHandler)
		return true, nil
	})
}

func taken(service tailcfg.ServiceName, port uint16) error {
	return &problem{
		what:   fmt.Sprintf("the node's serve config handles port %d of %s in another way", port, service),
		remedy: fmt.Sprintf("take that out of the serve config, as with tailscale serve clear %s, or use another port", service),
	}
}

// unserve takes back what serve did, and reports whether the node now serves no port of
// service.
func unserve(ctx context.Context, client *local.Client, service tailcfg.ServiceName, port uint16) (last bool, err error) {
	err = change(ctx, client, func(config *ipn.ServeConfig) (changed bool, err error) {
		s := config.Services[service]
		if s == nil {
			last = true
			return false, nil
		}
		if handler := s.TCP[port]; handler != nil && reflect.ValueOf(*handler).IsZero() {
			delete(s.TCP, port)
			changed = true
		}
		last = len(s.TCP) == 0 && len(s.Web) == 0 && !s.Tun
		if last {
			delete(config.Services, service)
		}
		return changed || last, nil
	})
	return last, err
}

// change has f change the serve config of the node, and writes it if f reports that. It
// does so again if another program has written one in the meantime, so that nothing of that
// is lost.
func change(ctx context.Context, client *local.Client, f func(*ipn.ServeConfig) (changed bool, err error)) error {
	settings.Lock()
	defer settings.Unlock()
	for attempt := 1; ; attempt++ {
		config, err := client.GetServeConfig(ctx)
		if err != nil {
			return err
		}
		changed, err := f(config)
		if err != nil || !changed {
			return err
		}
		err = client.SetServeConfig(ctx, config)
		if attempt == attempts || !local.IsPreconditionsFailedError(err) {
			return err
		}
	}
}

// advertise makes the node offer itself as a host of service, or no longer, whichever
// wanted reports once nothing else changes the settings.
func advertise(ctx context.Context, client *local.Client, service tailcfg.ServiceName, wanted func() bool) error {
	settings.Lock()
	defer settings.Unlock()
	offer := wanted()
	prefs, err := client.GetPrefs(ctx)
	if err != nil {
		return err
	}
	services := prefs.AdvertiseServices
	if slices.Contains(services, string(service)) == offer {
		return nil
	}
	if offer {
		services = append(slices.Clone(services), string(service))
	} else {
		services = slices.DeleteFunc(slices.Clone(services), func(s string) bool { return s == string(service) })
	}
	_, err = client.EditPrefs(ctx, &ipn.MaskedPrefs{AdvertiseServicesSet: true, Prefs: ipn.Prefs{AdvertiseServices: services}})
	return err
}
