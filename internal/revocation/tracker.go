// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"reflect"
	"slices"
	"time"
)

// Config is what one Caddy config has of sites.
type Config struct{ sites []*Site }

// Site is where one handler serves requests.
type Site struct {
	config    *Config
	listeners []string
	settings  any

	// What follows is guarded by mu.

	// rules are the site's own, or those of several that replaced them. A
	// request has to pass all.
	rules []Rules
	// next is the site that has taken this one's place, nil if none has.
	next *Site
	// open is the first of the site's open requests, nil if there is none.
	open *Request
	// armed reports whether a check is due.
	armed bool
}

// provisioning is the config that is being set up, by what tells it from others. It
// is guarded by mu.
var provisioning struct {
	key    any
	config *Config
}

// ConfigOf returns the config that key stands for: a new one unless it is the key of
// the call before, as Caddy sets up one config after the other.
func ConfigOf(key any) *Config {
	mu.Lock()
	defer mu.Unlock()
	if provisioning.config == nil || provisioning.key != key {
		provisioning.key, provisioning.config = key, new(Config)
	}
	return provisioning.config
}

// NewSite adds a site to the config. listeners are the addresses of its server, as
// they are configured. settings are what the rules follow from: sites whose
// settings are deeply equal have the same rules.
func (c *Config) NewSite(listeners []string, settings any, rules Rules) *Site {
	s := &Site{config: c, listeners: listeners, settings: settings, rules: []Rules{rules}}
	c.sites = append(c.sites, s)
	return s
}

// current holds the sites that a new config may take the place of: those of the
// config that runs, and those that are gone from it and still have requests.
// It belongs to the process. It is guarded by mu.
var current []*Site

// Run makes c the config that runs in this process. Requests that began under an
// earlier config are judged by c's rules from now on: by those of the site with
// the same listener and settings. If none has the same settings, by those of the
// site with the same listener that is new, or of all such sites if there are
// several, since any may be meant. If there is no site with the same listener
// either, the rules stay as they are. Further calls do nothing.
func (c *Config) Run() {
	mu.Lock()
	defer mu.Unlock()
	if slices.ContainsFunc(current, func(s *Site) bool { return s.config == c }) {
		return
	}
	before := current
	current = slices.Clone(c.sites)
	for _, old := range before {
		replacements := c.replacements(old, before)
		switch len(replacements) {
		case 0:
		case 1:
			old.moveTo(replacements[0])
			continue
		default:
			old.rules = nil
			for _, s := range replacements {
				old.rules = append(old.rules, s.rules...)
			}
		}
		if old.open != nil || old.armed { // or its next request would not be known
			current = append(current, old)
		}
	}
}

// replacements returns the sites of c that judge old's requests.
func (c *Config) replacements(old *Site, before []*Site) (changed []*Site) {
	for _, s := range c.sites {
		switch {
		case !s.shares(old):
		case s.equal(old):
			return []*Site{s}
		case !slices.ContainsFunc(before, func(b *Site) bool { return s.shares(b) && s.equal(b) }):
			changed = append(changed, s)
		}
	}
	return changed
}

func (s *Site) shares(other *Site) bool {
	return slices.ContainsFunc(s.listeners, func(l string) bool { return slices.Contains(other.listeners, l) })
}

func (s *Site) equal(other *Site) bool { return reflect.DeepEqual(s.settings, other.settings) }

// moveTo hands s's requests over to next, those that are still to come included.
func (s *Site) moveTo(next *Site) {
	s.next = next
	for s.open != nil {
		r := s.open
		s.remove(r)
		next.add(r)
	}
}

// add makes r one of s's open requests.
func (s *Site) add(r *Request) {
	r.site, r.previous, r.next = s, nil, s.open
	if r.next != nil {
		r.next.previous = r
	}
	s.open = r
	if s.armed {
		return
	}
	s.armed = true
	if !slices.Contains(current, s) {
		// Its config is gone: it must not be missed by the one after next.
		current = append(current, s)
	}
	time.AfterFunc(s.rules[0].Interval, s.check)
}

// remove makes r none of s's open requests any more.
func (s *Site) remove(r *Request) {
	if r.previous != nil {
		r.previous.next = r.next
	} else {
		s.open = r.next
	}
	if r.next != nil {
		r.next.previous = r.previous
	}
	r.previous, r.next = nil, nil
}
